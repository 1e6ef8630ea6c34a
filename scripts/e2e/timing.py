"""How whole towers are timed: by the clock on the wall, in turns. And what a call costs besides: memory, host, gaps."""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType

Outputs = list[Tensor]
"""Tokens, then DeepStack features."""
Call = Callable[[], Any]

REPEATS = 20
"""Of what is measured outside turns."""
BUSY = 20_000_000
"""Cycles that the GPU is kept waiting, about 10 ms: longer than the host takes for a call."""


def wall(call: Call) -> float:
    """Seconds from the call until its result is there."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del out
    return seconds


def take_turns(
    calls: Mapping[str, Call], rounds: int, share: float, fewest: int, always: Collection[str] = ()
) -> dict[str, list[float]]:
    """Seconds on the wall of each call of each contender, in turns; one round comes before.

    A contender that would take more than its share of seconds sits out rounds at even distances, but plays in `fewest`
    at least; those named in `always` play in all.
    """
    every = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        turns = min(max(int(share / wall(call)), fewest), rounds)
        every[name] = 1 if name in always else rounds // turns
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number % every[name] == 0:
                spent[name].append(wall(call))
    return spent


def held_bytes() -> int:
    """Memory in use, and memory that CUDA graphs keep for themselves."""
    kept = (part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0))
    return torch.cuda.memory_allocated() + sum(part["total_size"] - part["allocated_size"] for part in kept)


def driver_bytes() -> int:
    """Memory that the driver took for itself (contexts, modules, graphs), and torch's allocator knows nothing of."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def clean() -> None:
    """Leave no memory but what somebody holds.

    Graphs that are gone leave their pools until the next capture, and cuBLAS keeps workspaces for every stream it met.
    No graph may be alive: it would go on to use the workspace of its stream.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def memory_of(prepare: Callable[[], Callable[[], Outputs]]) -> tuple[int, Outputs]:
    """Bytes that a call and all that it keeps add at the peak of its second time, results included; and these.

    What is kept: buffers, pools of graphs, workspaces. No CUDA graph may be alive before.
    """
    clean()
    held = held_bytes()
    call = prepare()
    call()
    torch.cuda.synchronize()
    kept, before = held_bytes() - held, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    return kept + torch.cuda.max_memory_allocated() - before, out


def host_time(call: Call) -> dict[str, float]:
    """Median µs until the call returns, the GPU busy with something else; and in how many of the calls it was done
    with that when the call returned, so that the host may have waited."""
    spent, waited = [], 0
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY)
        busy = torch.cuda.Event()
        busy.record()
        start = time.perf_counter()
        out = call()
        spent.append((time.perf_counter() - start) * 1e6)
        waited += busy.query()
        del out
    torch.cuda.synchronize()
    return {"us": statistics.median(spent), "waited": waited}


def replay_time(call: Call) -> float:
    """Median µs of the CUDA graph that a call replays, by events right around it, the host well ahead; no profiler."""
    replay, pairs = torch.cuda.CUDAGraph.replay, []

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay(graph)
        end.record()
        pairs.append((start, end))

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", timed):
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            torch.cuda._sleep(BUSY)
            call()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in pairs)


def kernel_times(call: Call) -> dict[str, Any]:
    """Kernels of one call, by time, and how long it takes the GPU from the first to the last; µs, by the profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    spent, calls = Counter[str](), Counter(event.name for event in events)
    for event in events:
        spent[event.name] += event.time_range.elapsed_us()
    span = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    return {"span": span, "kernels": [{"name": n, "calls": calls[n], "us": us} for n, us in spent.most_common()]}
