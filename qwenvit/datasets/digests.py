"""Sets of texts that only say whether a text is in them: eight bytes each, so that a million ids stay small."""

import hashlib

import numpy as np
from numpy.typing import NDArray

MAX_RECENT = 65_536
"""Digests that wait in a Python set before they are sorted into an array."""


class DigestSet:
    """A set of texts of which 64-bit digests are kept.

    Two of a million texts share a digest with probability 3e-8.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._runs: list[NDArray[np.uint64]] = []  # sorted, disjoint, each less than half as long as the one before

    def add(self, text: str) -> bool:
        """Add a text; return whether it was not in the set."""
        digest = digest_of(text)
        if self._has(digest):
            return False
        self._recent.add(digest)
        if len(self._recent) == MAX_RECENT:
            run = np.sort(np.fromiter(self._recent, np.uint64, MAX_RECENT))
            while self._runs and len(self._runs[-1]) < 2 * len(run):
                run = np.sort(np.concatenate([self._runs.pop(), run]))
            self._runs.append(run)
            self._recent.clear()
        return True

    def __contains__(self, text: str) -> bool:
        return self._has(digest_of(text))

    def __len__(self) -> int:
        return len(self._recent) + sum(map(len, self._runs))

    def _has(self, digest: int) -> bool:
        if digest in self._recent:
            return True
        wanted = np.uint64(digest)
        for run in self._runs:
            position = int(np.searchsorted(run, wanted))
            if position < len(run) and run[position] == wanted:
                return True
        return False


def digest_of(text: str) -> int:
    """Return 64 bits that differ between texts, but with probability 5e-20."""
    encoded = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
