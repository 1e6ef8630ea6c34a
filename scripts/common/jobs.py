"""Work spread over processes, so that compilers run side by side, and a line that says how far it is."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

MOST = 12
"""Processes; each holds a CUDA context."""


def progress(text: str) -> None:
    """Replace the line of progress on stderr."""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def parallel(function: Callable[[list[str], int], Any], only: list[str], count: int) -> list[Any]:
    """Results of `function(only, 0)` to `function(only, count - 1)`, or the exceptions they raised.

    Processes are new ones: a CUDA context does not survive a fork. What Triton and Inductor compile there, later calls
    find in the caches on disk.
    """
    workers = max(1, min(MOST, (os.cpu_count() or 2) - 2, count))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(function, only, number) for number in range(count)]
        for done, _ in enumerate(as_completed(jobs), 1):
            progress(f"compiling {done}/{count}")
    progress("")
    return [job.exception() or job.result() for job in jobs]
