"""Hidden states from graphs, without CUDA: graphs, pools and counts of their own, moved weights, bounds."""

from unittest.mock import Mock

import pytest
import torch

from qwenvit.graphs import graphed_tower
from qwenvit.graphs.capacity import MIN_GRAPH_PATCHES, Capacity, capacity_for, coarse_capacity, pool_patches_for
from qwenvit.graphs.graphed_tower import GraphedTower
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import check_grid
from qwenvit.plan.reading_order import reading_order
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.graphs_on_cpu import captured, cpu_tower, images, replayed, states
from support.towers import narrow


def test_layers_have_graphs_of_their_own(calls):
    """And counts of their own: what comes twice in a row is the same size with the same layers."""
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, 64)
    whole = dict(graphs._graphs)
    for layers in ((1,), (0, 1), (0,)):
        states(graphs, layers, 64, 64, 40, 42)
        images(graphs, 64)
    assert {key: graphs._graphs[key] for key in whole} == whole
    for call in calls:
        if call[0] == "replayed":
            assert call[3] in ((), (1,), (0, 1), (0,))
    ran = [call[3] for call in calls if call[0] == "replayed"]
    assert ran == [()] + [(1,)] * 4 + [()] + [(0, 1)] * 4 + [()] + [(0,)] * 4 + [()]
    own, coarse = (capacity(Capacity(1600, 1, 0, 1, 40), 4) for capacity in (capacity_for, coarse_of))
    captures = len(captured(calls))
    images(graphs, 40)  # the same size came with layers, which counts for them alone
    assert replayed(calls)[-1] == coarse.patches
    states(graphs, (1,), 40, 40)
    assert replayed(calls)[-1] == own.patches
    assert len(captured(calls)) == captures + 2


def test_the_first_batch_of_some_layers_gets_a_graph_of_its_own(calls):
    """As the first of all does: graphs of other layers are none that it could share."""
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, 64)
    states(graphs, (0, 1), 40)
    assert replayed(calls)[-1] == capacity_for(Capacity(1600, 1, 0, 1, 40), 4).patches


def coarse_of(need, merge_unit):
    return coarse_capacity(capacity_for(need, merge_unit), merge_unit)


def test_the_pool_is_sized_for_layers_before_small_graphs(calls):
    """Captured in rising order, each would add memory; a whole pass has the memory of a pass that copies nothing."""
    tower = cpu_tower()
    graphs, pool = GraphedTower(tower), pool_patches_for(1)
    images(graphs, 4)
    assert [call[1:] for call in calls if call[0] == "captured"] == [(pool, ()), (MIN_GRAPH_PATCHES, ())]
    calls.clear()
    states(graphs, (1,), 4)
    states(graphs, (0,), 4)
    assert [call[1:] for call in calls if call[0] == "captured"] == [
        (MIN_GRAPH_PATCHES, (1,)), (MIN_GRAPH_PATCHES, (0,)),
    ]  # fmt: skip
    calls.clear()
    states(graphs, (0, 1), 4)
    assert [call[1:] for call in calls if call[0] == "captured"] == [(pool, (0, 1)), (MIN_GRAPH_PATCHES, (0, 1))]
    calls.clear()
    states(graphs, (1,), 80)  # a larger pool, for which all of this starts again
    assert {key.layers for key in graphs._graphs} == {(1,)}
    images(graphs, 4)
    grown = pool_patches_for(6400, grows=True)
    assert next(call[1:] for call in calls if call[0] == "captured") == (grown, (1,))
    assert (grown, ()) in [call[1:] for call in calls if call[0] == "captured"]


def test_a_pass_is_run_before_a_capture_that_goes_deeper(calls, monkeypatch):
    """It initialises libraries, which a capture may not do."""
    runs = []

    class RecordingGraph(graphed_tower.Graph):
        def __init__(self, *arguments):
            runs.append((arguments[6], arguments[5]))
            super().__init__(*arguments)

    monkeypatch.setattr(graphed_tower, "Graph", RecordingGraph)
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    states(graphs, (0,), 64)
    states(graphs, (0, 1), 64)
    images(graphs, 64)
    states(graphs, (1,), 64)
    assert [run for run in runs if run[1]] == [((0,), True), ((0, 1), True), ((), True)]


def test_weights_that_moved_are_found_when_layers_are_asked_for(calls):
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    states(graphs, (1,), 40, 40)
    old = set(graphs._graphs.values())
    weight = tower.blocks[0].attn.qkv.weight
    weight.data = weight.data.clone()
    states(graphs, (1,), 40)
    assert not old & set(graphs._graphs.values())
    tower.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no forward hooks"):
        states(graphs, (1,), 40)


@pytest.mark.parametrize("by_token", [False, True])
def test_layers_of_a_batch_too_large_for_a_graph(no_cuda, monkeypatch, by_token):
    no_cuda.current_stream = Mock()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    monkeypatch.setattr(graphed_tower, "MAX_GRAPH_PATCHES", 8)
    config = narrow("qwen2_5_vl", depth=3, out_hidden_size=8)
    tower = FastTower(config, "reference")
    tower.load_state_dict(ReferenceTower(config).state_dict())
    grid, pixels = check_grid([[1, 12, 10], [2, 4, 6]], 2), torch.randn(168, config.patch_dim)
    expected = tower(pixels, GridPlan.build(grid, config)).last_hidden_state
    order = reading_order(grid.tensor, config, by_token)
    for pixel_values in (pixels, lambda rows: rows.copy_(pixels)):
        first, last = GraphedTower(tower).hidden_states(pixel_values, grid, (0, 3), by_token)
        torch.testing.assert_close(last, expected[order])
        torch.testing.assert_close(first, tower.embed(pixels, GridPlan.build(grid, config))[order])


def test_reading_orders_and_counts_are_bounded(calls, monkeypatch):
    monkeypatch.setattr(graphed_tower, "MAX_READING_ORDERS", 3)
    monkeypatch.setattr(graphed_tower, "MAX_COUNTED_LAYERS", 2)
    computed, compute = [], reading_order
    monkeypatch.setattr(graphed_tower, "reading_order", lambda *arguments: computed.append(1) or compute(*arguments))
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    states(graphs, (1,), 4, 6, 8, 8, 6)
    assert len(computed) == 3
    graphs.hidden_states(torch.zeros(16, 1), check_grid([[1, 4, 4]], 2), (1,), True)
    assert len(computed) == 4
    assert len(graphs._reading_orders) == 3
    for layers in ((0,), (0, 1), (1,)):
        states(graphs, layers, 4)
    assert len(graphs._sharing) == 2
