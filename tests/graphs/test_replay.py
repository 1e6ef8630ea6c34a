"""Replays of one graph without CUDA: what they read of a batch, and the copies that they return."""

from unittest.mock import Mock

import pytest
import torch

from qwenvit.graphs import device_plan, graph
from qwenvit.graphs.graph import write_pixels
from qwenvit.outputs import TowerOutput
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.graphs_on_cpu import cpu_tower
from support.towers import narrow


def test_pixel_values_are_copied_or_written_to_the_rows():
    rows, pixels = torch.full((4, 6), torch.nan), torch.randn(4, 6)
    for pixel_values in (pixels, pixels.double(), lambda out: out.copy_(pixels)):
        rows.fill_(torch.nan)
        write_pixels(rows, pixel_values)
        assert torch.equal(rows, pixels)


def test_a_replay_reads_the_table_of_its_batch(monkeypatch, make_graph):
    monkeypatch.setattr(graph, "reserve_workspaces", Mock())
    made = make_graph(cpu_tower("reference", torch.float32), lambda x, _: TowerOutput(x, x[::4].clone(), []))
    seen = []
    monkeypatch.setattr(made.graph, "replay", lambda: seen.append(made.table.clone()))
    first, second = torch.full_like(made.table, 1), torch.full_like(made.table, 2)
    rows = torch.zeros(16, made.pixel_values.shape[1])
    order = [first, first, second, second, first]
    for table in order:
        made.replay(table, rows, 16)
    assert all(map(torch.equal, seen, order))
    # A table whose copy failed is copied again, even if it is the one from before.
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", Mock(side_effect=RuntimeError("copy")))
        with pytest.raises(RuntimeError, match="copy"):
            made.replay(second, rows, 16)
    made.table.fill_(3)  # what a copy that failed halfway may leave
    made.replay(first, rows, 16)
    assert torch.equal(seen[-1], first)


@pytest.mark.parametrize("deepstack", [0, 3])
def test_a_replay_returns_copies_of_the_rows_of_the_batch(monkeypatch, make_graph, deepstack):
    monkeypatch.setattr(graph, "reserve_workspaces", Mock())
    captured = []

    def transform(x, plan):
        captured.extend([torch.randn_like(x), *(torch.randn(len(x) // 4, 24) for _ in range(1 + deepstack))])
        return TowerOutput(captured[0], captured[1], captured[2:])

    made = make_graph(cpu_tower("reference", torch.float32), transform)
    table = torch.zeros_like(made.table)
    for patches in (16, 40, len(captured[0])):
        output = made.replay(table, torch.zeros(patches, made.pixel_values.shape[1]), patches)
        outputs = [output.last_hidden_state, output.pooler_output, *output.deepstack_features]
        for copied, x, rows in zip(outputs, captured, [patches, *[patches // 4] * (1 + deepstack)], strict=True):
            assert torch.equal(copied, x[:rows])
            assert copied.untyped_storage().nbytes() == copied.nbytes
            assert copied.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 1, 3), (1, 2, 3)])
def test_a_graph_of_layers_keeps_each_before_the_blocks_overwrite_it(monkeypatch, make_graph, layers):
    """It runs no block after the deepest layer, and no merger; a replay returns the batch's rows in the order asked."""
    monkeypatch.setattr(graph, "reserve_workspaces", Mock())
    config = narrow("qwen2_5_vl", depth=3, out_hidden_size=8)
    tower = FastTower(config, "reference")
    tower.load_state_dict(ReferenceTower(config).state_dict())
    first, blocks = torch.randn(320, config.hidden_size), []
    plan = GridPlan.build([[1, 16, 20]], config)  # of the graph's capacity: plain torch attends within whole segments
    monkeypatch.setattr(device_plan, "compute_plan", lambda *_: plan)
    monkeypatch.setattr(tower, "embed", lambda *_: first.clone())
    for index, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_, index=index: blocks.append(index))
    for merger in (tower.merger, *tower.deepstack_mergers):
        monkeypatch.setattr(merger, "forward", Mock(side_effect=AssertionError("merger")))
    made = make_graph(tower, layers=layers)
    assert blocks == list(range(layers[-1]))
    expected, x = [first], first.clone()
    with torch.no_grad():
        for index in range(3):
            x = tower.apply_block(index, x.clone(), plan)
            expected.append(x)
    order = torch.randperm(40)
    found = made.replay_states(torch.zeros_like(made.table), torch.zeros(40, config.patch_dim), 40, lambda: order)
    assert made.graph.replay.called
    for layer, state in zip(layers, found, strict=True):
        assert torch.equal(state, expected[layer][:40][order]), layer
        assert state.untyped_storage().nbytes() == state.nbytes
