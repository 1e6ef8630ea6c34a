"""What a job tells about its work while it runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

SECONDS_BETWEEN_REPORTS = 0.2


@dataclass(frozen=True)
class Progress:
    """How far a job is. Counts are of this run, and of items that are encoded, not yet of rows on the disk."""

    encoded: int
    failed: int
    skipped: int
    """Items that earlier runs have encoded."""
    expected: int | None
    """All items of the inputs, done or not; None while it is not known."""
    tokens: int
    seconds: float
    """Since the first item was drawn."""
    waiting: float
    """The share, 0 to 1, of that time in which the devices had nothing to do."""


@dataclass(frozen=True)
class ItemReport:
    """What became of one item."""

    id: str
    grid: tuple[int, int, int]
    """Frame groups, rows and columns of merged tokens; zeros for an item that failed."""
    tokens: int
    error: str | None
    """Why the item has no embeddings, in one line; None if it has."""


class Meter:
    """Counts items and passes a `Progress` on, a few times a second.

    Attributes:
        encoded, failed, skipped, tokens: as in `Progress`.
        busy_seconds: the time that the devices have worked, added up.
    """

    def __init__(
        self, expected: Callable[[], int | None], num_devices: int, show: Callable[[Progress], None] | None
    ) -> None:
        self.encoded = self.failed = self.skipped = self.tokens = 0
        self.busy_seconds = 0.0
        self._expected = expected
        self._num_devices = num_devices
        self._show = show
        self._start = time.perf_counter()
        self._next = self._start

    def restart(self) -> None:
        """Count time from now on."""
        self._start = self._next = time.perf_counter()

    def count(self, item: ItemReport) -> None:
        """Count one item."""
        if item.error is None:
            self.encoded += 1
            self.tokens += item.tokens
        else:
            self.failed += 1

    def report(self, *, last: bool = False) -> None:
        """Pass the counts on if it is time, or if the job ends."""
        now = time.perf_counter()
        if self._show is None or (now < self._next and not last):
            return
        self._next = now + SECONDS_BETWEEN_REPORTS
        seconds = now - self._start
        waiting = 1 - self.busy_seconds / (seconds * self._num_devices) if seconds else 0.0
        self._show(
            Progress(
                self.encoded,
                self.failed,
                self.skipped,
                self._expected(),
                self.tokens,
                seconds,
                min(max(waiting, 0.0), 1.0),
            )
        )
