"""Wall time of a call, the time of its work on the GPU, and the order in which contenders take turns."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Call = Callable[[], Any]

BUSY_CYCLES = 20_000_000
"""GPU clock cycles of busy waiting, about 10 ms: longer than the host part of a call."""


def balanced_orders(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """Yield an order of all names for each round, so that within rounds each follows every other equally often.

    That holds over as many rounds as there are names, or twice as many if their number is odd. At its power limit a
    GPU's clock may depend on what ran just before (TUNING.md, against FlashAttention 4), and in a fixed order each
    contender would always follow the same one. The orders are E. J. Williams' (1949): a zigzag through the names,
    shifted by one each round; for an odd number of names each is followed by its reverse.
    """
    names = list(names)
    count = len(names)
    zigzag = [(i + 1) // 2 if i % 2 else count - i // 2 for i in range(count)]
    for number in range(rounds):
        backwards = count % 2 == 1 and number % 2 == 1
        shift = number // 2 if count % 2 else number
        order = [names[(i + shift) % count] for i in zigzag]
        yield order[::-1] if backwards else order


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
