"""How long a device has worked on batches, measured without waiting for it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BusyClock:
    """Adds up the time that a device works on batches. Use it in one thread.

    Args:
        measures: False for a clock that stays at 0 and costs nothing.
    """

    def __init__(self, measures: bool = True) -> None:
        self._measures = measures
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Count the time of work that is done when the block ends."""
        start = time.perf_counter()
        yield
        if self._measures:
            self._seconds += time.perf_counter() - start

    @contextmanager
    def on_stream(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Count the GPU's time for work that the block queues on a stream, once the GPU has done it."""
        if not self._measures:
            yield
            return
        start = stream.record_event(torch.cuda.Event(enable_timing=True))
        yield
        self._running.append((start, stream.record_event(torch.cuda.Event(enable_timing=True))))

    def seconds(self) -> float:
        """Return the time of all work that is done; does not wait for what is not."""
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._seconds += start.elapsed_time(end) / 1e3
        return self._seconds
