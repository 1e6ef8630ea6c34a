"""How long graphs live, without CUDA: moved weights, hooks, copies of the tower, weights that leave the GPU."""

import copy
import gc
import pickle
import weakref
from unittest.mock import Mock

import pytest
import torch

from qwenvit.graphs import graphed_tower
from qwenvit.graphs.graphed_tower import GraphedTower, graphs_of
from qwenvit.plan.inputs import check_grid
from support.graphs_on_cpu import captured, cpu_tower, images


def pretend_captured(graphs, grid):
    """Put a stub in place of the graph that runs a batch."""
    capacity = graphs._prepare(grid).capacity
    graphs._graphs[graphs._graph_key(capacity)] = Mock(capacity=capacity)


@pytest.mark.parametrize("sides", [(40,), (64, 40)])
def test_weights_that_moved_between_two_meetings(calls, sides):
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, *sides)
    old = set(graphs._graphs.values())
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    images(graphs, 40)
    assert not old & set(graphs._graphs.values())
    assert graphs._graphs
    assert graphs._weights.weights_unmoved()


def test_graphs_hold_no_reference_to_themselves(no_cuda):
    """With a reference cycle, their memory would stay allocated until Python's garbage collector runs."""
    tower = cpu_tower()
    tower.graphs = GraphedTower(tower)
    watched = weakref.ref(tower.graphs)
    gc.disable()
    try:
        tower.graphs = None
        assert watched() is None
        tower.graphs, alive = GraphedTower(tower), weakref.ref(tower)
        del tower
        assert alive() is None
    finally:
        gc.enable()


def noted_runs(monkeypatch, captured):
    """Return a tower, its graphs, a grid, and a list of whether the weights were unmoved in each pass, which are stubs.

    The grid has a graph, which is a stub too, if `captured`.
    """
    tower = cpu_tower()
    graphs, grid, runs = GraphedTower(tower), check_grid([[1, 4, 4]], 2), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    for name in ("_run", "_replay"):
        monkeypatch.setattr(graphs, name, lambda *_: runs.append(graphs._weights.weights_unmoved()))
    if captured:
        pretend_captured(graphs, grid)
    return tower, graphs, grid, runs


@pytest.mark.parametrize("captured", [True, False])
def test_moved_weights_are_found_before_a_capture_and_after_a_replay(no_cuda, monkeypatch, captured):
    tower, graphs, grid, runs = noted_runs(monkeypatch, captured)
    graphs._encode(torch.zeros(16, 1), grid)
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    graphs._encode(torch.zeros(16, 1), grid)
    assert runs == ([True, False, True] if captured else [True, True])
    assert not graphs._graphs
    no_cuda.synchronize.assert_called_once_with(graphs.device)


def test_no_stale_graph_is_left_when_the_next_is_captured(calls, monkeypatch):
    """It would keep the pool allocated that it shared, beside the new one."""
    alive = []

    class WatchedGraph(graphed_tower.Graph):
        def __init__(self, *arguments):
            assert not [graph for graph in alive if graph() is not None]
            alive.append(weakref.ref(self))
            super().__init__(*arguments)

    monkeypatch.setattr(graphed_tower, "Graph", WatchedGraph)
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, 64, 64)
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    images(graphs, 64)
    assert len(alive) == len(captured(calls)) == 2


@pytest.mark.parametrize("captured", [True, False])
def test_hooks_are_refused_and_not_captured(no_cuda, monkeypatch, captured):
    tower, graphs, grid, runs = noted_runs(monkeypatch, captured)
    handle = tower.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no forward hooks"):
        graphs._encode(torch.zeros(16, 1), grid)
    assert len(runs) == captured  # a replay whose result is dropped, but no capture
    handle.remove()
    graphs._encode(torch.zeros(16, 1), grid)
    assert len(runs) == captured + 1


def test_a_move_that_fails_halfway_leaves_no_graphs(no_cuda):
    """Old graphs would read memory that is no longer allocated to the weights."""
    tower = cpu_tower()
    tower.graphs = GraphedTower(tower)

    def convert(x):
        if x is tower.merger.fc2.weight:
            raise MemoryError("no memory")
        return x.double()

    with pytest.raises(MemoryError):
        tower._apply(convert)
    assert tower.graphs is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_copies_start_without_graphs(no_cuda, duplicate):
    tower = cpu_tower()
    tower.graphs = GraphedTower(tower)
    twin = duplicate(tower)
    assert twin.graphs is None
    assert tower.graphs.tower is tower
    assert torch.equal(twin.patch_embed.weight, tower.patch_embed.weight)


def test_a_shallow_copy_has_graphs_of_its_own(no_cuda, monkeypatch):
    tower = cpu_tower()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    first, twin = graphs_of(tower), copy.copy(tower)
    assert graphs_of(tower) is first
    assert twin.graphs is first
    assert graphs_of(twin).tower is twin


@pytest.mark.parametrize("replaced", [True, False])
def test_a_tower_whose_weights_left_the_gpu_has_no_graphs(no_cuda, monkeypatch, replaced):
    """Whether they were replaced, as by `load_state_dict(..., assign=True)`, or moved where they are."""
    tower = cpu_tower()
    on_gpu = {id(parameter) for parameter in tower.parameters()}
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: id(tensor) in on_gpu))
    graphs, weight = graphs_of(tower), tower.patch_embed.weight
    assert graphs_of(tower) is graphs is not None
    if replaced:
        tower.patch_embed.weight = torch.nn.Parameter(weight.clone())
    else:
        on_gpu.remove(id(weight))
    assert graphs_of(tower) is None
    tower.patch_embed.weight = weight
    on_gpu.add(id(weight))
    assert graphs_of(tower) is graphs
