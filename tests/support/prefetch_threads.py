"""The threads of `prefetch` that are alive."""

import gc
import threading
import time

from qwenvit.preprocess.threads import NAME


def prefetch_threads() -> list[threading.Thread]:
    """Return the threads of all prefetching iterators."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]


def assert_no_prefetch_threads(seconds: float = 10, *, collect_garbage: bool = True) -> None:
    """Wait until no thread of `prefetch` is alive; fail after some seconds."""
    if collect_garbage:
        gc.collect()
    deadline = time.monotonic() + seconds
    while prefetch_threads() and time.monotonic() < deadline:  # `join` is not for threads that are just being started
        time.sleep(0.005)
    assert not prefetch_threads()
