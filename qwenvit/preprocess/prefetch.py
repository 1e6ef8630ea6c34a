"""Preparing the items of a stream in threads ahead of their consumer: in order, and bounded in memory."""

import itertools
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from queue import Empty
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from qwenvit.preprocess.threads import Threads

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_READY_BYTES = 256 * 2**20
"""No further item is started while results of this size wait for the consumer."""
MAX_AHEAD = 1024
"""No further item is started while so many wait: results may be tiny, and errors have none."""
SLOW_SOURCE_SECONDS = 0.05
"""A source that takes longer to give an item is slow, as a camera is: see `WAITING`."""
DEFAULT_WORKERS = 4
"""More threads gain nothing (TUNING.md)."""


class Prefetched(NamedTuple, Generic[Result]):
    """What became of an item: a result or an error, and the other is None."""

    position: int
    result: Result | None
    error: Exception | None


WAITING = Prefetched[Any](-1, None, None)
"""Yielded before a slow source is asked for an item: flush what is ready."""


def check_num_workers(num_workers: int | None) -> int:
    """Return the number of threads; None means 4, or one for each core of a smaller machine.

    Raises:
        ValueError: not an integer of at least 0.
    """
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(DEFAULT_WORKERS, cores)
    if isinstance(num_workers, bool) or not isinstance(num_workers, int | np.integer) or num_workers < 0:
        raise ValueError(f"num_workers: expected None or an integer of at least 0, got {num_workers!r}")
    return int(num_workers)


def prefetch(
    items: Iterable[Item],
    prepare: Callable[[int, Item], Result],
    num_workers: int,
    num_bytes: Callable[[Result], int],
) -> Generator[Prefetched[Result]]:
    """Yield `prepare(index, item)` of every item in order, computed in threads ahead of the consumer.

    Items are drawn in the consumer's thread. One slow item delays its own turn and nothing else: later items are
    prepared meanwhile, until their results reach `MAX_READY_BYTES`. An exception of `prepare` is the outcome of its
    item; an exception of `items` is raised after the outcomes of all items before it. Where `items` is slow, `WAITING`
    is yielded before it is asked. Closing the iterator abandons the items ahead: threads end with the item they are at.

    Args:
        items: drawn one at a time, a few ahead of the consumer.
        prepare: called in any thread.
        num_workers: threads; 0 prepares each item when the consumer asks for it, in its own thread.
        num_bytes: the memory of a result.
    """

    # An item is in a list of one, which `outcome` empties: else the frames in an error's traceback would keep the item.
    def outcome(index: int, box: list[Item]) -> Prefetched[Result]:
        item = box.pop()
        try:
            return Prefetched(index, prepare(index, item), None)
        except Exception as error:  # noqa: BLE001 the consumer decides
            del item
            _forget_locals(error)
            return Prefetched(index, None, error)

    source, indices = iter(items), itertools.count()
    seconds_to_draw = 0.0

    def draw() -> list[Item]:
        nonlocal seconds_to_draw
        start = time.perf_counter()
        box = [next(source)]
        seconds_to_draw = time.perf_counter() - start
        return box

    if num_workers == 0:
        while True:
            if seconds_to_draw >= SLOW_SOURCE_SECONDS:
                yield WAITING
            try:
                box = draw()
            except StopIteration:
                return
            yield outcome(next(indices), box)

    def work(task: tuple[int, list[Any]]) -> tuple[int, int | BaseException]:
        """Put an item's outcome in its place, and return its index and size."""
        index, box = task
        try:
            box.append(outcome(index, box))
            result = box[0].result
            return index, 0 if result is None else num_bytes(result)
        except BaseException as error:  # noqa: BLE001 no outcome of an item: SystemExit, as an example
            _forget_locals(error)
            return index, error

    source_failed: list[Exception] = []  # popped when it is raised: this frame, in its traceback, must not refer to it
    waiting: deque[tuple[int, list[Any]]] = deque()  # in order
    ready: dict[int, int] = {}  # sizes by index, of those of them that have an outcome
    ready_bytes = 0
    exhausted = False
    threads = Threads(work, num_workers)

    def collect(seconds: float | None) -> None:
        """Note what has an outcome; wait so long for the first, or until it is there."""
        nonlocal ready_bytes
        with suppress(Empty):
            while True:
                index, size = threads.result(seconds)
                if isinstance(size, BaseException):
                    try:
                        raise size
                    finally:  # this frame must not refer to it either
                        del size
                ready[index] = size
                ready_bytes += size
                seconds = 0

    try:
        while True:
            # Draw at least one item for each that is yielded, more only while the next one is not ready: a consumer of
            # a slow stream gets each result without waiting for items far ahead.
            while (
                not exhausted
                and threads.unfinished < 2 * num_workers
                and len(waiting) < MAX_AHEAD
                and ready_bytes < MAX_READY_BYTES
            ):
                if seconds_to_draw >= SLOW_SOURCE_SECONDS:
                    if threads.unfinished == len(waiting) == 1:
                        collect(SLOW_SOURCE_SECONDS)
                    if len(waiting) == len(ready) == 1:
                        break  # yield it before the source is asked
                    yield WAITING
                try:
                    box = draw()
                except StopIteration:
                    exhausted = True
                except Exception as error:  # noqa: BLE001 raised below, in its turn
                    source_failed.append(error)
                    exhausted = True
                else:
                    waiting.append((next(indices), box))
                    threads.add(waiting[-1])
                    collect(0)
                    if waiting[0][0] in ready:
                        break
            if not waiting:
                break
            collect(0 if waiting[0][0] in ready else None)
            if waiting[0][0] in ready:
                index, outcomes = waiting.popleft()
                ready_bytes -= ready.pop(index)
                yield outcomes.pop()
    finally:
        threads.end()
    if source_failed:
        raise source_failed.pop()


def _forget_locals(error: BaseException) -> None:
    """Drop the local variables of the frames of an error and its causes: they keep the item it is about."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
