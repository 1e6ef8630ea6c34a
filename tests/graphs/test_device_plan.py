"""The plan computed on the device from a table of the grids, against `GridPlan` and against its definition."""

import itertools
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


def axis_taps(index, size, side):
    """The two entries of a row of the position table that patch `index` of `size` lies between, and their weights."""
    low, rest = divmod(index * (side - 1), size - 1)
    return (low, 1 - rest / (size - 1)), (min(low + 1, side - 1), rest / (size - 1))


def plan_by_brute_force(grid, config):
    """Walk through items, frames, windows, tokens and patches, as the definitions of `GridPlan`'s fields say.

    Returns:
        Row and column of each patch in the tower's order; the bounds of frames and of windows; `restore_index`; taps
        and weights of each patch.
    """
    merge, table_side = config.spatial_merge_size, config.position_grid
    side = (config.window_size or 10**6 * config.patch_size) // config.patch_size  # without windows, all in one
    places, frames, windows, order, taps, weights = [], [0], [0], [], [], []
    for t, h, w in grid:
        for _ in range(t):
            first_token = frames[-1] // merge**2
            for top, left in itertools.product(range(0, h, side), range(0, w, side)):
                rows, columns = range(top, min(top + side, h), merge), range(left, min(left + side, w), merge)
                for row, column in itertools.product(rows, columns):
                    order.append(first_token + row // merge * (w // merge) + column // merge)
                    for r, c in itertools.product(range(row, row + merge), range(column, column + merge)):
                        places.append((r, c))
                        if table_side:
                            pairs = list(itertools.product(axis_taps(r, h, table_side), axis_taps(c, w, table_side)))
                            taps.append([low * table_side + high for (low, _), (high, _) in pairs])
                            weights.append([a * b for (_, a), (_, b) in pairs])
                windows.append(len(places))
            frames.append(len(places))
    restore = torch.tensor(order).argsort()
    return torch.tensor(places), frames, windows, restore, torch.tensor(taps), torch.tensor(weights)


def check_by_brute_force(ours, config, grid):
    places, frames, windows, restore, taps, weights = plan_by_brute_force(grid, config)
    n = len(places)
    frequency = config.rope_theta ** (-torch.arange(0, 1, 4 / config.head_dim, dtype=torch.float64))
    angles = (places[:, :, None] * frequency).flatten(1).repeat(1, 2)
    for got, expected, spare in ((ours.cos, angles.cos(), 1.0), (ours.sin, angles.sin(), 0.0)):
        torch.testing.assert_close(got[:n].cpu().double(), expected, rtol=0, atol=2e-5)
        assert (got[n:] == spare).all()
    assert ours.frames.cu_seqlens[: len(frames)].tolist() == frames
    if config.window_size is not None:
        assert ours.windows.cu_seqlens[: len(windows)].tolist() == windows
        got = ours.restore_index.cpu()
        assert torch.equal(got[: len(restore)], restore)
        assert torch.equal(got[len(restore) :], torch.arange(len(restore), len(got)))
    if config.position_grid:
        assert torch.equal(ours.position_taps[:n].cpu(), taps)
        torch.testing.assert_close(ours.position_weights[:n].cpu(), weights, rtol=0, atol=1e-5)


def check(config, grid, spare, impl):
    grid = torch.tensor(grid) * torch.tensor([1, 2, 2])
    need = device_plan.measure_grids(grid, config)
    capacity = device_plan.Capacity(
        need.patches + 4 * spare, need.frames + spare, need.windows + spare, need.items + spare, need.side + spare
    )
    table = device_plan.grid_table(grid, config, capacity.items).to(DEVICE)
    angles = device_plan.angle_tables(config, capacity.side, torch.device(DEVICE))
    ours, plan = device_plan.compute_plan(table, angles, config, capacity, impl), GridPlan.build(grid, config, DEVICE)
    check_by_brute_force(ours, config, grid.tolist())
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


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_large_and_long_grids(name, impl):
    check(CONFIGS[name], [[1, 30, 48], [2, 1, 100], [1, 77, 3]], 3, impl)


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
