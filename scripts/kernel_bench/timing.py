"""Time kernels with CUDA graphs over inputs larger than the L2 cache, and list the kernels that a call launches."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch
from torch.autograd import DeviceType

from common.kernel_inputs import Inputs
from common.machine import Ceilings, describe_machine
from common.timing import balanced_orders

Call = Callable[[Inputs], object]

WARMUP_REPLAYS = 2
TIMED_REPLAYS = 20
INPUT_BYTES = 256 * 2**20
"""Bytes of all input sets of a graph: four times an H200's L2, and still more than it if a call reads a third."""
METHOD = (
    "Times are µs a call: medians of {replays} replays of a CUDA graph. A graph makes one call for each of many input "
    "sets (about {mebibytes} MiB or more together, so that L2 never has the inputs) and writes each output to its own "
    "memory. The implementations of a row take turns, in another order each time. No time includes a launch from "
    "Python."
)


def capture_graph(call: Call, input_sets: Iterable[Inputs]) -> torch.cuda.CUDAGraph:
    """Capture one call for each set of inputs. Outputs live until the end, so that no two share memory in the cache."""
    input_sets = list(input_sets)
    for inputs in input_sets[:2]:  # compiles kernels, and lets libraries choose theirs
        call(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(inputs) for inputs in input_sets]
    del outputs
    return graph


def median_seconds(calls: Mapping[str, Call], input_sets: list[Inputs]) -> dict[str, float]:
    """Return the median seconds a call, by the name of the call."""
    graphs = {name: capture_graph(call, input_sets) for name, call in calls.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for order in balanced_orders(graphs, WARMUP_REPLAYS + TIMED_REPLAYS):
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    milliseconds = {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs[WARMUP_REPLAYS:])
        for name, pairs in events.items()
    }
    return {name: median / 1e3 / len(input_sets) for name, median in milliseconds.items()}


def input_set_count(inputs: Inputs) -> int:
    """Return how many sets like this one make up INPUT_BYTES: at least 3, at most 128."""
    return min(max(-(-INPUT_BYTES // sum(x.untyped_storage().nbytes() for x in inputs.values())), 3), 128)


def peak_extra_bytes(call: Call, inputs: Inputs) -> int:
    """Return the peak memory of one call above its inputs and outputs. Call it once before, so that it is compiled."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    outputs = call(inputs)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del outputs
    return extra


LIBRARIES = {"cuDNN": r"cudnn", "FlashAttention": r"flash", "cuBLAS": r"nvjet|gemm|cublas|cutlass|splitK"}
"""Libraries, and a pattern that the names of their kernels match."""


def launched_kernels(call: Call, inputs: Inputs) -> list[str]:
    """Profile one call and return the labels of the kernels it launches, in order, each once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(inputs)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    labels = [kernel_label(name) for name in names if not re.match(r"mem(set|cpy)", name, re.IGNORECASE)]
    return list(dict.fromkeys(labels))


def kernel_label(name: str) -> str:
    """Return the library of a profiled kernel, or the kernel's own name."""
    for library, pattern in LIBRARIES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return library
    return "torch" if "at::native" in name else name[:40]


def header(measured: Ceilings, commit: str | None) -> str:
    """Describe the machine, the versions and the method."""
    method = METHOD.format(replays=TIMED_REPLAYS, mebibytes=INPUT_BYTES >> 20)
    return f"{describe_machine(measured, commit)}\n\n{method}"
