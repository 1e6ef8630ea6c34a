"""Threads that work through tasks, whose owner may be interrupted while it waits for them."""

import _thread
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Task = TypeVar("Task")
Done = TypeVar("Done")

NAME = "qwenvit-prefetch"
"""How names of these threads begin."""
SECONDS_BETWEEN_LOOKS = 0.1
"""How often an idle thread looks whether the interpreter ends."""


class Threads(Generic[Task, Done]):
    """Threads that call a function with one task after another.

    Everything between their owner and them is a `SimpleQueue`, whose methods are C. `concurrent.futures` has locks that
    Python code takes: where Ctrl-C comes between taking one and noting that it is taken, no one gives it back, and
    threads, and so the end of the interpreter, wait for it forever.

    Args:
        work: called with a task, in any thread. It must not raise.
        count: of threads, at most.
    """

    def __init__(self, work: Callable[[Task], Done], count: int) -> None:
        self._work, self._count = work, count
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._results: SimpleQueue[Done] = SimpleQueue()
        self._started = 0
        self.unfinished = 0
        """Tasks whose results have not been taken."""
        self._owner = threading.current_thread()
        self._interpreter_ends = False

    def add(self, task: Task) -> None:
        """Let some thread call `work` with a task: another one, if more are `unfinished` than there are threads.

        Raises:
            RuntimeError: the interpreter ends, or the system has no thread left.
        """
        self._look_after()
        self.unfinished += 1
        self._tasks.put(task)
        if self._started < min(self.unfinished, self._count):
            thread = threading.Thread(target=self._run, name=f"{NAME}-{self._started}", daemon=False)
            _thread.start_new_thread(self._start, (thread,))
            self._started += 1

    def result(self, seconds: float | None = None) -> Done:
        """Return the next result, in the order in which they are ready; wait for it, or for so many seconds.

        Raises:
            queue.Empty: there is none in time.
            RuntimeError: the interpreter ends.
        """
        self._look_after()
        result = self._results.get(timeout=seconds)
        self.unfinished -= 1
        return result

    def end(self) -> None:
        """Drop the tasks that no thread has begun. Threads end with those they are at; this does not wait for them."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        self._tasks.put(None)

    def _look_after(self) -> None:
        self._owner = threading.current_thread()  # a generator may go from thread to thread
        if self._interpreter_ends:
            raise RuntimeError("images cannot be prepared while the interpreter ends")

    def _start(self, thread: threading.Thread) -> None:
        """Start a thread from another one, where no Ctrl-C comes: `start` has a lock as described."""
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left but this one
            self._run()

    def _run(self) -> None:
        while (task := self._next_task()) is not None:
            self._results.put(self._work(task))
            del task  # it would stay in memory until the next comes
        self._tasks.put(None)  # for the next thread

    def _next_task(self) -> Task | None:
        """Return the next task, or None if there are no more."""
        while not self._is_abandoned():
            with suppress(Empty):
                return self._tasks.get(timeout=SECONDS_BETWEEN_LOOKS)
        self._interpreter_ends = True
        return None

    def _is_abandoned(self) -> bool:
        """Return whether the interpreter waits for its threads, and the owner is none that it waits for."""
        return not threading.main_thread().is_alive() and (self._owner.daemon or not self._owner.is_alive())
