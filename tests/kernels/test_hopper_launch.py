"""Launches of attention on Hopper: cached descriptors, and counters that no two launches share."""

from unittest import mock

import torch
import triton
from test_hopper_attention import attend, cumulative, needs_hopper
from triton import knobs

from qwenvit.kernels.attention import hopper, hopper_launch
from qwenvit.kernels.attention.hopper import hopper_attention
from support.rope_attention_cases import packed

pytestmark = needs_hopper


def test_launches_reuse_encoded_descriptors():
    """With triton 3.6 and no hooks the native launcher runs, else Triton's; results are the same."""
    q, k, v = packed(500, 4, 80, torch.bfloat16, "cuda")
    bounds = [0, 100, 500]
    first, launches = attend(q, k, v, bounds), []

    def spy(*arguments):
        launches.append(hopper_launch.cached_launch(*arguments))
        return launches[-1]

    with mock.patch.object(hopper, "cached_launch", spy):
        for _ in range(3):
            assert torch.equal(attend(q, k, v, bounds), first)
    assert launches[0] is launches[2]
    assert (launches[0].native_launcher is not None) == triton.__version__.startswith("3.6.")
    with mock.patch.object(launches[0], "native_launcher", None):
        assert torch.equal(attend(q, k, v, bounds), first)
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)  # as profilers do
    try:
        assert torch.equal(attend(q, k, v, bounds), first)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert seen


def test_streams_and_graphs_at_once():
    """Launches that overlap take tiles by counters of their own."""
    bounds = cumulative([1000, 3, 64, 0, 777, 128, 500])
    q, k, v = packed(bounds[-1], 16, 72, torch.bfloat16, "cuda")
    right = attend(q, k, v, bounds)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(4)]
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(4)], [[] for _ in range(8)]
    for graph, out in zip(graphs, outs, strict=False):
        with torch.cuda.graph(graph):
            out += [torch.empty_like(right) for _ in range(3)]
            for one in out:
                hopper_attention(q, k, v, cu_seqlens, 72**-0.5, one)
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, graph, out in zip(streams, graphs, outs[4:], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                out.append(torch.empty_like(right))
                hopper_attention(q, k, v, cu_seqlens, 72**-0.5, out[-1])
    torch.cuda.synchronize()
    assert all(torch.equal(one, right) for out in outs for one in out)


def test_graphs_captured_when_the_pool_is_used_up():
    q, k, v = packed(300, 4, 64, torch.bfloat16, "cuda")
    right = attend(q, k, v, [0, 100, 300])
    cu_seqlens, out = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda"), torch.empty_like(right)
    graph = torch.cuda.CUDAGraph()
    with mock.patch.object(hopper_launch, "COUNTER_PAIRS", 0), torch.cuda.graph(graph):
        hopper_attention(q, k, v, cu_seqlens, 0.125, out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, right)


def test_graph_whose_bounds_change():
    q, k, v = packed(1500, 4, 80, torch.bfloat16, "cuda")
    out = torch.empty(1500, 4, 80, dtype=q.dtype, device="cuda")
    cu_seqlens = torch.tensor([0, 64, 128, 1500], dtype=torch.int32, device="cuda")
    attend(q, k, v, [0, 64, 128, 1500])  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hopper_attention(q, k, v, cu_seqlens, 80**-0.5, out)
    for bounds in ([0, 64, 128, 1500], [0, 1, 1490, 1500], [0, 0, 1500, 1500], [0, 500, 1000, 1500]):
        cu_seqlens.copy_(torch.tensor(bounds))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, attend(q, k, v, bounds))
