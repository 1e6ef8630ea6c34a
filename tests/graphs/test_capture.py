"""Captures without CUDA: one at a time, without garbage collection, and what a failed one leaves."""

import contextlib
import gc
import threading
import time
from unittest.mock import Mock

import pytest
import torch

from qwenvit.graphs import graph, graphed_tower
from qwenvit.graphs.capacity import Capacity, capacity_for
from qwenvit.graphs.capture import capturing, garbage_collection_paused
from qwenvit.graphs.graphed_tower import CAPTURE_LOCK, GraphedTower
from qwenvit.outputs import TowerOutput
from support.graphs_on_cpu import cpu_tower, images, replayed


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", ["the pool's", "a later one"])
def test_after_a_failed_capture_the_next_gets_a_new_pool(calls, no_cuda, monkeypatch, error, failing):
    """torch may refuse captures in the pool of a failed one."""
    pools, fails = [], [failing == "the pool's"]

    class FailingGraph(graphed_tower.Graph):
        def __init__(self, *arguments):
            pools.append(arguments[4])
            if fails[0]:
                raise error
            super().__init__(*arguments)

    no_cuda.graph_pool_handle = object
    monkeypatch.setattr(graphed_tower, "Graph", FailingGraph)
    tower = cpu_tower(dtype=torch.float32)
    graphs = GraphedTower(tower)
    if not fails[0]:
        images(graphs, 64, 40)
        assert pools[0] is pools[1]
        fails[0] = True
    with pytest.raises(error):
        images(graphs, 42)
    assert not graphs._lock.locked()
    assert not CAPTURE_LOCK.locked()
    failed, fails[0] = len(pools), False
    images(graphs, 42, 40)
    assert len({id(pool) for pool in pools[failed:]}) == 1
    assert pools[failed] not in pools[:failed]
    assert replayed(calls)[-2:] == [capacity_for(Capacity(side**2, 1, 0, 1, side), 4).patches for side in (42, 40)]


def test_one_capture_at_a_time_in_a_process(calls, monkeypatch):
    towers = [cpu_tower() for _ in range(3)]
    capturing_now, together = [], []

    class SlowGraph(graphed_tower.Graph):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            capturing_now.append(1)
            time.sleep(0.01)
            together.append(len(capturing_now))
            capturing_now.pop()

    monkeypatch.setattr(graphed_tower, "Graph", SlowGraph)
    threads = [threading.Thread(target=images, args=(GraphedTower(tower), 4, 8, 12)) for tower in towers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) >= 6
    assert set(together) == {1}


def test_no_thread_synchronizes_with_the_gpu_during_a_capture(no_cuda):
    tower = cpu_tower()
    tower.graphs = GraphedTower(tower)
    no_cuda.synchronize.side_effect = lambda _: locked.append(CAPTURE_LOCK.locked())
    locked = []
    tower.double()  # calls release_memory
    graphs = GraphedTower(tower)
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    assert graphs._reset_if_weights_moved()
    assert locked == [True, True]
    assert not CAPTURE_LOCK.locked()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_paused_during_a_capture_and_then_as_before(enabled, fails):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        for _ in range(2):
            with pytest.raises(MemoryError) if fails else contextlib.nullcontext(), garbage_collection_paused():
                assert not gc.isenabled()
                if fails:
                    raise MemoryError
            assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("run_first", [True, False])
def test_garbage_is_collected_around_a_capture_but_not_during_one(no_cuda, monkeypatch, make_graph, run_first):
    """CUDA aborts a capture during which another graph is freed; workspaces are reserved in a capture of their own."""
    steps = []
    monkeypatch.setattr(graph, "reserve_workspaces", lambda *arguments: steps.append((arguments[0], gc.isenabled())))

    def transform(x, plan):
        steps.append((no_cuda.CUDAGraph.return_value.capture_begin.called, gc.isenabled()))
        return TowerOutput(x, x, [])

    made = make_graph(cpu_tower("reference"), transform, run_first)
    assert steps == [(False, True)] * run_first + [("stream", False), (True, False)]
    assert made.graph.capture_begin.call_args.kwargs["pool"] == "pool"
    assert made.graph.capture_end.called
    assert gc.isenabled()


def test_an_error_in_a_capture_is_raised_itself():
    """torch says of the capture only that it is invalid."""
    graph = Mock()
    graph.capture_end.side_effect = RuntimeError("capture invalidated")
    with pytest.raises(MemoryError), capturing(graph, None):
        raise MemoryError
    assert graph.capture_end.called
    with pytest.raises(RuntimeError, match="invalidated"), capturing(graph, None):
        pass
