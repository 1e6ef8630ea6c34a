"""The threads of `prefetch` that are alive."""

import gc
import threading
import time


def prefetch_threads() -> list[threading.Thread]:
    """Return the threads of all prefetching iterators."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("qwenvit-prefetch")]


def assert_no_prefetch_threads(seconds: float = 10) -> None:
    """Wait until no thread of `prefetch` is alive; fail after some seconds."""
    gc.collect()
    deadline = time.monotonic() + seconds
    for thread in prefetch_threads():
        thread.join(max(0, deadline - time.monotonic()))
    assert not prefetch_threads()
