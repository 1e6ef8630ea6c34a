"""The plan computed on the device from a table of the grids, against `GridPlan`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit import ops
from qwenvit.graphs import device_plan
from qwenvit.plan.grid_plan import GridPlan
from support.towers import FULL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = {"qwen2_vl": FULL["qwen2_vl"], "qwen2_5_vl": FULL["qwen2_5_vl"], "qwen3_vl": FULL["qwen3_vl"]}
CONFIGS["narrow windows"] = replace(FULL["qwen2_5_vl"], window_size=56)
grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=5)


def check(config, grid, spare, impl):
    grid = torch.tensor(grid) * torch.tensor([1, 2, 2])
    need = device_plan.measure_grids(grid, config)
    capacity = device_plan.Capacity(
        need.patches + 4 * spare, need.frames + spare, need.windows + spare, need.items + spare, need.side + spare
    )
    table = device_plan.grid_table(grid, config, capacity.items).to(DEVICE)
    angles = device_plan.angle_tables(config, capacity.side, torch.device(DEVICE))
    ours, plan = device_plan.compute_plan(table, angles, config, capacity, impl), GridPlan.build(grid, config, DEVICE)
    n = plan.num_patches
    assert n == need.patches
    assert torch.equal(ours.cos[:n], plan.cos)
    assert torch.equal(ours.sin[:n], plan.sin)
    for segments, expected in ((ours.frames, plan.frames), (ours.windows, plan.windows)):
        assert (segments is None) == (expected is None)
        if expected is not None:
            bounds, count = segments.cu_seqlens, len(expected.cu_seqlens)
            assert torch.equal(bounds[:count], expected.cu_seqlens)
            assert (bounds[count:] == n).all()
            assert len(bounds) == count + spare
            assert segments.max_seqlen >= expected.max_seqlen
    if plan.restore_index is not None:
        assert torch.equal(ours.restore_index[: n // 4], plan.restore_index)
        assert ours.restore_index.sort().values.tolist() == list(range(capacity.patches // 4))
    if plan.position_taps is not None:
        assert torch.equal(ours.position_taps[:n], plan.position_taps)
        assert torch.equal(ours.position_weights[:n], plan.position_weights)
        assert 0 <= ours.position_taps.min() <= ours.position_taps.max() < config.num_position_embeddings


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(CONFIGS)), grids, st.sampled_from([0, 1, 70]), st.sampled_from(["triton", "reference"]))
def test_it_equals_the_grid_plan(name, grid, spare, impl):
    check(CONFIGS[name], grid, spare, impl)


@pytest.mark.parametrize("name", CONFIGS)
def test_large_and_long_grids(name):
    check(CONFIGS[name], [[1, 30, 48], [2, 1, 100], [1, 77, 3]], 3, "triton")


def test_bad_arguments():
    config = CONFIGS["qwen2_vl"]
    angles = device_plan.angle_tables(config, 8, torch.device("cpu"))
    table = device_plan.grid_table(torch.tensor([[1, 4, 4]]), config, 1)
    with pytest.raises(ValueError, match="patches: expected a multiple of 4, got 18"):
        ops.grid_plan(table, *angles, config, 18, 1, 0)
    with pytest.raises(TypeError, match=r"table: expected torch\.int64"):
        ops.grid_plan(table.int(), *angles, config, 16, 1, 0)
    with pytest.raises(ValueError, match=r"sin_table: expected shape \[any, 20\]"):
        ops.grid_plan(table, angles[0], angles[1][:, :3], config, 16, 1, 0)
