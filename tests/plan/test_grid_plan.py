"""GridPlan against transformers' helpers, and against brute force from the definitions."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils

from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.rope import apply_rope, rope_cos_sin
from support.towers import SMALL

WINDOWED, LEARNED = SMALL["qwen2_5_vl"], SMALL["qwen3_vl"]

side = st.integers(1, 30).map(lambda n: 2 * n)
grids = st.lists(st.tuples(st.integers(1, 4), side, side).map(list), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(grids)
def test_equals_transformers_helpers(batch):
    grid = torch.tensor(batch)
    plan = GridPlan.build(batch, LEARNED)
    assert torch.equal(plan.position_ids, vision_utils.get_vision_position_ids(grid, 2))
    assert torch.equal(plan.frames.cu_seqlens, vision_utils.get_vision_cu_seqlens(grid))
    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, 48, align_corners=True, spatial_merge_size=2
    )
    assert torch.equal(plan.position_taps, taps)
    assert torch.equal(plan.position_weights, weights)

    windowed = GridPlan.build(batch, WINDOWED)
    index, cu_seqlens = vision_utils.get_vision_window_index(grid, 2, 112, 14)
    assert torch.equal(windowed.window_index, index)
    assert torch.equal(windowed.windows.cu_seqlens, cu_seqlens)
    assert torch.equal(windowed.window_index[windowed.restore_index], torch.arange(len(index)))


@settings(max_examples=40, deadline=None)
@given(grids)
def test_windows_by_brute_force(batch):
    """Two patches share a window exactly when their frame and their 8 x 8 square of patches are the same."""
    plan = GridPlan.build(batch, WINDOWED)
    frame = torch.cat([torch.full((h * w,), 100 * i + f) for i, (t, h, w) in enumerate(batch) for f in range(t)])
    frame = frame.unflatten(0, (-1, 4))[plan.window_index].flatten()
    start = 0
    seen = set()
    for end in plan.windows.cu_seqlens[1:].tolist():
        places = {(int(f), int(r) // 8, int(c) // 8) for f, (r, c) in
                  zip(frame[start:end], plan.position_ids[start:end], strict=True)}  # fmt: skip
        assert len(places) == 1
        assert not places & seen
        seen |= places
        start = end
    assert start == plan.num_patches


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from([WINDOWED, LEARNED]))
def test_groups_cover_every_segment_once(batch, config):
    plan = GridPlan.build(batch, config)
    for segments in filter(None, (plan.frames, plan.windows)):
        assert (
            torch.cat([rows.flatten() for _, rows in segments.groups])
            .sort()
            .values.equal(torch.arange(plan.num_patches))
        )
        bounds = segments.cu_seqlens.tolist()
        expected = set(itertools.pairwise(bounds))
        got = {(int(row[0]), int(row[-1]) + 1) for _, rows in segments.groups for row in rows}
        assert got == expected
        assert all(rows.shape[1] == length for length, rows in segments.groups)
        assert segments.max_seqlen == max(b - a for a, b in expected)


def test_nothing_is_kept_for_a_tower_of_another_merge_size():
    batch = [[3, 8, 24], [1, 12, 4]]
    grid = torch.tensor(batch)
    for merge in (4, 1, 2):
        plan = GridPlan.build(batch, replace(WINDOWED, spatial_merge_size=merge))
        index, cu_seqlens = vision_utils.get_vision_window_index(grid, merge, 112, 14)
        assert torch.equal(plan.window_index, index)
        assert torch.equal(plan.windows.cu_seqlens, cu_seqlens)
        plan = GridPlan.build(batch, replace(LEARNED, spatial_merge_size=merge))
        assert torch.equal(plan.position_ids, vision_utils.get_vision_position_ids(grid, merge))
    for size in ([3, 8, 24], [1, 12, 4]):  # only the rows, only the columns
        GridPlan.build([size], LEARNED)
        with pytest.raises(ValueError, match="multiples of 3; item 0 is "):
            GridPlan.build([size], replace(LEARNED, spatial_merge_size=3))


def test_position_weights_resample_as_interpolate_does():
    """The taps equal torch's own bilinear resampling with aligned corners, also on grids of one merge block a side."""
    table = torch.randn(48 * 48, 5, dtype=torch.float64)
    image = table.T.reshape(1, 5, 48, 48)
    for height, width in [(2, 2), (48, 48), (10, 96), (64, 6)]:
        plan = GridPlan.build([[1, height, width]], LEARNED)
        ours = (table[plan.position_taps] * plan.position_weights[:, :, None].double()).sum(1)
        theirs = torch.nn.functional.interpolate(image, (height, width), mode="bilinear", align_corners=True)[0]
        row, column = plan.position_ids.unbind(1)
        torch.testing.assert_close(ours, theirs[:, row, column].T, rtol=0, atol=1e-4)


def test_rope_rotates_by_row_and_column():
    """With complex numbers: the row rotates the first half of the pairs, the column the second half."""
    positions = torch.tensor([[0, 0], [3, 5], [40, 1], [7, 7]])
    head_dim, theta = 80, 10000.0
    cos, sin = rope_cos_sin(positions, head_dim, theta)
    x = torch.randn(4, 3, head_dim, dtype=torch.float64)
    pairs = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :])
    frequency = theta ** (-torch.arange(0, 1, 4 / head_dim, dtype=torch.float64))
    angle = torch.cat((positions[:, :1] * frequency, positions[:, 1:] * frequency), dim=1)
    rotated = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.cat((rotated.real, rotated.imag), dim=-1)
    torch.testing.assert_close(apply_rope(x.float(), cos, sin).double(), expected, rtol=0, atol=2e-5)


def test_a_tower_of_full_attention_blocks_only():
    plan = GridPlan.build([[1, 4, 4]], replace(WINDOWED, family="qwen2_vl", intermediate_size=96 * 2,
                          window_size=None, fullatt_block_indexes=(), tokens_per_second=None))  # fmt: skip
    assert plan.windows is None
    assert plan.window_index is None
    assert plan.position_taps is None


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], r"expected \[items, 3\]"),
        (torch.zeros(0, 3, dtype=torch.int64), "at least one item"),
        ([[1, 4]], r"expected \[items, 3\].*got \[1, 2\]"),
        ([1, 4, 4], r"got \[3\]"),
        ([[1, 4.0, 4]], "float32"),
        ([[1, 2**40, 2**40]], "at most 2147483647 patches"),
        ([[2**33, 2**31, 2**31]], "at most 2147483647 patches"),
        (None, r"expected \[items, 3\] integers"),
        ([[1, 5, 4]], "item 0 is \\[1, 5, 4\\]"),
        ([[1, 4, 4], [1, 4, 0]], "item 1 is \\[1, 4, 0\\]"),
        ([[-1, 4, 4]], "positive"),
        ([[1, 2, 3], [1, 2]], r"expected \[items, 3\] integers"),
        ("ab", r"expected \[items, 3\] integers"),
    ],
)
def test_bad_grid_is_refused(grid, message):
    with pytest.raises(ValueError, match=f"grid_thw: .*{message}"):
        GridPlan.build(grid, WINDOWED)
