"""Threads that work through tasks, whose owner may be interrupted at any moment."""

import _thread
import atexit
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Done = TypeVar("Done")

NAME = "qwenvit-prefetch"
"""How names of these threads begin."""


class Threads(Generic[Task, Done]):
    """Threads that call a function with one task after another.

    Everything between their owner and them is a `SimpleQueue`, whose methods are C. `concurrent.futures` has locks that
    Python code takes: where Ctrl-C comes between taking one and noting that it is taken, no one gives it back, and
    threads, and so the end of the interpreter, wait for it forever.

    Args:
        work: called with a task, in any thread. It must not raise.
        count: of threads.
    """

    def __init__(self, work: Callable[[Task], Done], count: int) -> None:
        self._work, self._count = work, count
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._results: SimpleQueue[Done] = SimpleQueue()
        self._threads: list[_Thread] = []
        self._unfinished = 0

    def add(self, task: Task) -> None:
        """Let some thread call `work` with a task: a new one, if none is idle and there may be more."""
        self._unfinished += 1
        self._tasks.put(task)
        if len(self._threads) < min(self._unfinished, self._count):
            self._threads.append(_Thread(self._work, self._tasks, self._results, len(self._threads)))
            _thread.start_new_thread(self._threads[-1].start, ())  # `start` has such a lock, and Ctrl-C comes only here

    def result(self, seconds: float | None = None) -> Done:
        """Return the next result, in the order in which they are ready; wait for it, or for so many seconds.

        Raises:
            queue.Empty: there is none in time.
        """
        result = self._results.get(timeout=seconds)
        self._unfinished -= 1
        return result

    def end(self) -> None:
        """Drop the tasks that no thread has begun. Threads end with those they are at; this does not wait for them."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)


class _Thread(threading.Thread):
    """One of the threads. A daemon: for others, the interpreter would wait before it calls `_end_all`."""

    def __init__(
        self, work: Callable[[Any], Any], tasks: SimpleQueue[Any], results: SimpleQueue[Any], number: int
    ) -> None:
        super().__init__(name=f"{NAME}-{number}", daemon=True)
        self.work, self.tasks, self.results = work, tasks, results

    def run(self) -> None:
        while (task := self.tasks.get()) is not None:
            self.results.put(self.work(task))
            del task  # it would stay in memory until the next comes


@atexit.register
def _end_all() -> None:
    """Wait for the tasks that threads are at: the interpreter must not end under code that runs."""
    for thread in _threads():
        with suppress(Empty):
            while True:
                thread.tasks.get_nowait()
    for thread in _threads():
        thread.tasks.put(None)
    while _threads():  # `join` is not for threads that are just being started
        time.sleep(0.005)


def _threads() -> list[_Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, _Thread)]
