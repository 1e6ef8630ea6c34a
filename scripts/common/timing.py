"""Wall time of a call, the time of its work on the GPU, and the order in which contenders take turns."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Call = Callable[[], Any]

BUSY_CYCLES = 20_000_000
"""GPU clock cycles of busy waiting, about 10 ms: longer than the host part of a call."""


def random_orders(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """Yield all names in a random order for each round; the orders are the same in every run.

    A GPU at its power limit sets its clock by the power of the last milliseconds. In a fixed order a contender would
    always get the clock that the one before it left (TUNING.md, against FlashAttention 4).
    """
    generator, order = random.Random(0), list(names)
    for _ in range(rounds):
        generator.shuffle(order)
        yield order.copy()


def synchronize() -> None:
    """Wait until the GPU has done all work; where there is no GPU, do nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_seconds(call: Call) -> float:
    """Return the seconds from the call until its result is ready on the GPU."""
    synchronize()
    start = time.perf_counter()
    out = call()
    synchronize()
    seconds = time.perf_counter() - start
    del out
    return seconds


def gpu_seconds(call: Call, repeats: int) -> float:
    """Return the median seconds of a call's work on the GPU, by CUDA events; its wall time where there is no GPU.

    The GPU is kept busy until the host has launched the work, so the host's time is not included.
    """
    if not torch.cuda.is_available():
        return statistics.median(wall_seconds(call) for _ in range(repeats))
    pairs = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        out = call()
        end.record()
        pairs.append((start, end))
        del out
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)
