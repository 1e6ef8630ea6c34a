"""The inputs that a job could not encode: `errors.jsonl`."""

import json
from collections.abc import Iterator
from pathlib import Path

from qwenvit.datasets.atomic import write_atomically

NAME = "errors.jsonl"


class Failures:
    """The reason by the id of each input that is not encoded, in memory and in `errors.jsonl`.

    A run starts with what the run before it left, and tries these inputs again. When it comes to the end of its inputs,
    only its own failures are left.
    """

    def __init__(self, folder: Path) -> None:
        """Read the failures of the run before; a file that is damaged counts as none."""
        self._path = folder / NAME
        self._earlier: dict[str, str] = {}
        self._now: dict[str, str] = {}
        self._written = -1
        if self._path.exists():
            with self._path.open(encoding="utf-8") as lines:
                try:
                    for line in lines:
                        entry = json.loads(line)
                        self._earlier[str(entry["id"])] = str(entry["reason"])
                except (ValueError, KeyError, TypeError):
                    self._earlier.clear()

    def __len__(self) -> int:
        return len(self._earlier) + len(self._now)

    def add(self, identifier: str, reason: str) -> None:
        """Note a failure."""
        self._earlier.pop(identifier, None)
        self._now[identifier] = reason

    def encoded(self, identifier: str) -> None:
        """Note that an input is encoded, which may have failed before."""
        self._earlier.pop(identifier, None)

    def end_of_inputs(self) -> None:
        """Forget the failures of earlier runs whose inputs are gone."""
        self._earlier.clear()

    def write(self, *, last: bool = False) -> None:
        """Write the file if it is not what it should be. Between shards, a long one is written only when it has grown.

        Raises:
            OSError: the file cannot be written.
        """
        if not last and self._written >= 0 and abs(len(self) - self._written) <= self._written // 10:
            return
        if len(self) or self._path.exists():
            write_atomically(self._path, self._lines())
        self._written = len(self)

    def _lines(self) -> Iterator[str]:
        for failures in (self._earlier, self._now):
            for identifier, reason in failures.items():
                yield json.dumps({"id": identifier, "reason": reason}) + "\n"
