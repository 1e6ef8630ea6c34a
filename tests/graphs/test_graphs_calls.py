"""Calls of graphs without CUDA: streams, threads, and where the pixel values go."""

import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from qwenvit.graphs import graphed_tower
from qwenvit.graphs.graphed_tower import GraphedTower
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import check_grid
from support.graphs_on_cpu import cpu_tower, images


def test_pixel_values_reach_the_graph_as_they_are(calls):
    tower = cpu_tower()
    for pixel_values in (torch.zeros(16, 1), torch.Tensor.zero_):
        GraphedTower(tower)(pixel_values, check_grid([[1, 4, 4]], 2))
        assert calls[-1][2] is pixel_values


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_waits_for_the_one_before_on_the_gpu(calls, no_cuda, fails):
    """Its work starts after the event of the last call, and its own event is recorded even after a failure."""
    streams = [Mock(), Mock()]
    no_cuda.Event = lambda: SimpleNamespace(record=lambda stream: calls.append(("recorded", stream)))
    for stream in streams:
        stream.wait_event.side_effect = lambda event, stream=stream: calls.append(("waited", stream, event))
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    event = graphs._last_call_done
    for stream in streams:
        no_cuda.current_stream.return_value = stream
        images(graphs, 4)
    first, second = ([call for call in calls if call[0] != "captured"][start : start + 3] for start in (0, 3))
    for made, stream in zip((first, second), streams, strict=True):
        assert made[0] == ("waited", stream, event)
        assert made[1][0] == "replayed"
        assert made[2] == ("recorded", stream)
    if fails:
        for stub in graphs._graphs.values():
            stub.replay = Mock(side_effect=MemoryError)
        with pytest.raises(MemoryError):
            images(graphs, 4)
        assert calls[-1] == ("recorded", streams[1])


def test_calls_of_several_threads_run_one_after_another(calls, monkeypatch):
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, 4, 4)
    running, together = [], []

    def replay(*_):
        running.append(1)
        time.sleep(0.01)
        together.append(len(running))
        running.pop()

    for stub in graphs._graphs.values():
        monkeypatch.setattr(stub, "replay", replay)
    threads = [threading.Thread(target=images, args=(graphs, 4, 4)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 8


def test_a_batch_too_large_for_a_graph_takes_pixel_values_or_a_callable(no_cuda, monkeypatch):
    no_cuda.current_stream = Mock()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    monkeypatch.setattr(graphed_tower, "MAX_GRAPH_PATCHES", 8)
    tower = cpu_tower(impl="reference")
    grid, pixels = [[1, 4, 4], [1, 2, 6]], torch.randn(28, tower.config.patch_dim)
    expected = tower(pixels, GridPlan.build(grid, tower.config, "cpu"))
    for pixel_values in (pixels, lambda rows: rows.copy_(pixels)):
        output = GraphedTower(tower)(pixel_values, check_grid(grid, 2))
        torch.testing.assert_close(output.pooler_output, expected.pooler_output)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
