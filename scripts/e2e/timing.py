"""Measure calls of whole towers: wall time in interleaved rounds, memory, host time, replay time and kernel times."""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.autograd import DeviceType

from common.timing import BUSY_CYCLES, Call, balanced_orders, wall_seconds
from common.tower_inputs import Outputs, TowerCall

REPEATS = 20
"""Calls of a measurement that is not interleaved with rivals."""
CACHE_BYTES = 2**28
"""Read and written to empty a CPU's caches: the largest have about as much."""
WARM_IN_A_ROW, IN_A_ROW = 40, 30
"""Untimed and timed calls in a row: as many as the figures of `--vllm` are medians of, and as many before them."""


def time_interleaved(
    calls: Mapping[str, Call], rounds: int, max_seconds: float, min_rounds: int, every_round: Collection[str] = ()
) -> dict[str, list[float]]:
    """Return the wall seconds of every timed call, by contender.

    Contenders are called one after another in each round, in another order each time, after one untimed round.

    Args:
        calls: the call of each contender.
        rounds: rounds to time.
        max_seconds: a contender that would take longer in all rounds together skips rounds, at even distances.
        min_rounds: rounds that every contender runs at least.
        every_round: contenders that run in all rounds, however long they take.
    """
    interval = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        affordable = min(max(int(max_seconds / wall_seconds(call)), min_rounds), rounds)
        interval[name] = 1 if name in every_round else rounds // affordable
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number, order in enumerate(balanced_orders(calls, rounds)):
        for name in order:
            if number % interval[name] == 0:
                seconds[name].append(wall_seconds(calls[name]))
    return seconds


def time_in_a_row(call: Call) -> list[float]:
    """Return the wall seconds of calls with nothing else between them.

    At its power limit a GPU lowers its clock, which calls between those of slow rivals may not meet.
    """
    return [wall_seconds(call) for _ in range(WARM_IN_A_ROW + IN_A_ROW)][WARM_IN_A_ROW:]


def allocated_bytes() -> int:
    """Return the bytes of allocated GPU memory, the whole pools of CUDA graphs included."""
    pools = (segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0))
    unused = sum(segment["total_size"] - segment["allocated_size"] for segment in pools)
    return torch.cuda.memory_allocated() + unused


def driver_bytes() -> int:
    """Return the bytes of GPU memory outside torch's allocator: contexts, modules, graphs."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def free_cached_memory() -> None:
    """Free all GPU memory that no tensor uses.

    Pools of deleted CUDA graphs stay allocated until the next capture, and cuBLAS keeps a workspace for every stream it
    ran on. No CUDA graph may be alive: it would go on to use the freed workspace of its stream. The pools of
    workspaces that qwenvit's graphs use stay (`qwenvit/graphs/workspace.py`).
    """
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def peak_memory(prepare: Callable[[], TowerCall]) -> tuple[int, Outputs]:
    """Return the bytes that a call adds at the peak of its second run, and its outputs.

    The bytes include the outputs and all that the call keeps: buffers, pools of CUDA graphs, workspaces. No CUDA graph
    may be alive before.
    """
    free_cached_memory()
    before = allocated_bytes()
    call = prepare()
    call()
    torch.cuda.synchronize()
    kept, tensors_before = allocated_bytes() - before, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    return kept + torch.cuda.max_memory_allocated() - tensors_before, out


def host_time(call: Call) -> dict[str, float]:
    """Time the host part of a call that replays a CUDA graph, while the GPU is busy with earlier work.

    Returns:
        `us`, `launch`: median microseconds until the call returns, and until it launches its graph; `cold_launch`: the
        latter while the GPU is idle and the CPU's caches hold other data; `waited`: number of calls that returned after
        the earlier work was done, so that the host may have waited for it.

    Raises:
        RuntimeError: a call replays no graph.
    """
    replay, launched = torch.cuda.CUDAGraph.replay, list[float]()

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        launched.append(time.perf_counter())
        replay(graph)

    def timed() -> tuple[float, float]:
        launched.clear()
        start = time.perf_counter()
        out = call()
        returned = time.perf_counter()
        if not launched:
            raise RuntimeError("the call replays no CUDA graph")
        del out
        return (launched[0] - start) * 1e6, (returned - start) * 1e6

    def busy() -> tuple[float, float, bool]:
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        earlier = torch.cuda.Event()
        earlier.record()
        return *timed(), earlier.query()

    def cold() -> float:
        torch.cuda.synchronize()
        np.add(other_data, 1, out=other_data)
        return timed()[0]

    other_data = np.zeros(CACHE_BYTES, dtype=np.uint8)
    with mock.patch.object(torch.cuda.CUDAGraph, "replay", noted):
        launches, returns, waits = zip(*(busy() for _ in range(REPEATS)), strict=True)
        cold_launches = [cold() for _ in range(REPEATS)]
    torch.cuda.synchronize()
    medians = {"us": returns, "launch": launches, "cold_launch": cold_launches}
    return {name: statistics.median(times) for name, times in medians.items()} | {"waited": sum(waits)}


def replay_time(call: Call) -> float:
    """Return the median microseconds of the CUDA graph that a call replays.

    CUDA events surround the replay, the GPU is kept busy until the host has launched it, and no profiler runs.
    """
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
            torch.cuda._sleep(BUSY_CYCLES)
            call()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in pairs)


def kernel_times(call: Call) -> dict[str, Any]:
    """Profile one call.

    Returns:
        `span`: microseconds from the start of the first kernel to the end of the last; `kernels`: name, number of calls
        and total microseconds (`us`) of each kernel, the slowest first.
    """
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
