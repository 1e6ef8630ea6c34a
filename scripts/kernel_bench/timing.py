"""How kernels are timed: medians of CUDA graphs, in turns, over inputs that do not fit in the cache; and ceilings."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import DeviceType

from common.machine import Ceilings, machine

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], object]

ROUNDS = 20
"""Replays of each graph that count; two more come before."""
ROTATION = 256 * 2**20
"""Bytes of inputs that a graph goes through: four times the 60 MB of an H200's L2, of which a contender that reads half
of a set's tensors still goes through twice."""
METHOD = (
    "Times are µs a call, medians of {rounds} replays of a CUDA graph of one call for each of many input sets "
    "(about {mebibytes} MiB or more together, so that nothing is found in L2), outputs written to as many places; the "
    "contenders of a row take turns, replay by replay. No launch from Python is in any figure."
)


def graph_of(call: Call, sets: Iterable[Inputs]) -> torch.cuda.CUDAGraph:
    """A call for each set of inputs, outputs held until the end, so that none takes another's place in the cache."""
    sets = list(sets)
    for inputs in sets[:2]:  # compiles, and lets libraries choose
        call(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(inputs) for inputs in sets]
    del outputs
    return graph


def medians(calls: Mapping[str, Call], sets: list[Inputs]) -> dict[str, float]:
    """Seconds a call, of each contender."""
    graphs = {name: graph_of(call, sets) for name, call in calls.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(ROUNDS + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs[2:]) / 1e3 / len(sets)
        for name, pairs in events.items()
    }


def set_count(inputs: Inputs) -> int:
    """Sets of inputs that make up ROTATION, 3 at least and 128 at most."""
    return min(max(-(-ROTATION // sum(x.untyped_storage().nbytes() for x in inputs.values())), 3), 128)


def peak_bytes(call: Call, inputs: Inputs) -> int:
    """Memory that one call holds at its peak, above its inputs and outputs; the call has been made before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    outputs = call(inputs)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del outputs
    return extra


LIBRARIES = {"cuDNN": r"cudnn", "FlashAttention": r"flash", "cuBLAS": r"nvjet|gemm|cublas|cutlass|splitK"}
"""Kernels that are not ours, by what their names have in common."""


def kernels_of(call: Call, inputs: Inputs) -> list[str]:
    """Names of the kernels that one call launches, as the profiler saw them; libraries' by the library's name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(inputs)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    found = [kernel_name(name) for name in names if not re.match(r"mem(set|cpy)", name, re.IGNORECASE)]
    return list(dict.fromkeys(found))


def kernel_name(name: str) -> str:
    for library, pattern in LIBRARIES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return library
    return "torch" if "at::native" in name else name[:40]


def header(measured: Ceilings, commit: str | None) -> str:
    """The machine, the versions and the method."""
    return f"{machine(measured, commit)}\n\n{METHOD.format(rounds=ROUNDS, mebibytes=ROTATION >> 20)}"
