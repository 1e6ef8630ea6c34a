"""Spread compilation over processes, so that compilers run side by side."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from common.progress import progress

MAX_PROCESSES = 12
"""Each process has a CUDA context of its own."""


def run_in_processes(function: Callable[[list[str], int], Any], only: list[str], count: int) -> list[Any]:
    """Return the results of `function(only, 0)` to `function(only, count - 1)`, or the exceptions they raised.

    Processes are spawned, since a CUDA context does not survive a fork. Triton and Inductor leave what they compile in
    their caches on disk, for later calls.

    Args:
        function: called in a new process; has to be importable.
        only: the user's choice of cases or kernels (`--only`).
        count: number of calls.
    """
    workers = max(1, min(MAX_PROCESSES, (os.cpu_count() or 2) - 2, count))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(function, only, number) for number in range(count)]
        for done, _ in enumerate(as_completed(jobs), 1):
            progress(f"compiling {done}/{count}")
    progress("")
    return [job.exception() or job.result() for job in jobs]
