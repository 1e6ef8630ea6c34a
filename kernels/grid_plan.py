"""What a tower needs to know of its grids, computed where it is used: positions, order, segments, table entries.

Everything about a patch is a closed form of its place in the tower's order: the item it belongs to is found by
bisecting a table of running sums, its frame, window, token and place in the token follow by division. So one launch
serves any grids of a given capacity, and a CUDA graph that holds it is captured once for all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = tl.constexpr(5)
"""Of the table of items: patches, frames and windows before the item; its rows and columns of patches."""
BLOCK = 64


@triton.jit
def _column(table_ptr, b_item, COLUMN: tl.constexpr):
    return tl.load(table_ptr + b_item * COLUMNS + COLUMN)


@triton.jit
def _item_of(table_ptr, n_items, b_count, COLUMN: tl.constexpr):
    """The last item with at most so many patches, frames or windows before it."""
    b_item = b_count * 0
    b_past = b_item + n_items
    n_left = n_items
    while n_left > 1:
        b_middle = (b_item + b_past) // 2
        right = _column(table_ptr, b_middle, COLUMN) <= b_count
        b_item = tl.where(right, b_middle, b_item)
        b_past = tl.where(right, b_past, b_middle)
        n_left = (n_left + 1) // 2
    return b_item


@triton.jit
def _window_start(b_window, b_height, b_width, SIDE: tl.constexpr):
    """First token of a window in its frame of so many rows and columns of tokens, windows of SIDE in reading order."""
    n_across = (b_width + SIDE - 1) // SIDE
    b_row = b_window // n_across * SIDE
    return b_row * b_width + b_window % n_across * SIDE * tl.minimum(SIDE, b_height - b_row)


@triton.jit(do_not_specialize=["n_items", "n_patches"])
def _place_patches(
    table_ptr,  # int64, shape (n_items + 1, 5), see COLUMNS; the last row holds the totals
    cos_table_ptr,  # fp32, shape (positions, D / 4)
    sin_table_ptr,  # same
    cos_ptr,  # fp32, shape (n_patches, D)
    sin_ptr,  # same
    restore_ptr,  # int64, shape (n_patches / MERGE²,); None in towers without windows
    taps_ptr,  # int64, shape (n_patches, 4); None in towers without learned positions
    tap_weights_ptr,  # fp32, shape (n_patches, 4)
    n_items,
    n_patches,
    D: tl.constexpr,
    MERGE: tl.constexpr,
    SIDE: tl.constexpr,
    TABLE_SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    UNIT: tl.constexpr = MERGE * MERGE
    o_patch = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_patch = o_patch < n_patches
    m_real = o_patch < _column(table_ptr, n_items, 0)  # the rest is room to spare, and gets what does no harm
    b_patch = tl.where(m_real, o_patch, 0)
    b_item = _item_of(table_ptr, n_items, b_patch, 0)
    b_height = _column(table_ptr, b_item, 3)
    b_width = _column(table_ptr, b_item, 4)
    b_within = (b_patch - _column(table_ptr, b_item, 0)) % (b_height * b_width)
    b_frame = b_patch - b_within  # the frame's first patch
    b_place = b_within // UNIT
    b_across = b_width // MERGE
    b_token_row = b_place // b_across
    b_token_column = b_place % b_across
    if restore_ptr is not None:
        b_first_row = b_place // (SIDE * b_across) * SIDE
        n_rows = tl.minimum(SIDE, b_height // MERGE - b_first_row)
        b_in_band = b_place - b_first_row * b_across
        b_first_column = b_in_band // (n_rows * SIDE) * SIDE
        n_columns = tl.minimum(SIDE, b_across - b_first_column)
        b_in_window = b_in_band - b_first_column * n_rows
        b_token_row = b_first_row + b_in_window // n_columns
        b_token_column = b_first_column + b_in_window % n_columns
        b_reading = b_frame // UNIT + b_token_row * b_across + b_token_column
        b_reading = tl.where(m_real, b_reading, o_patch // UNIT)
        tl.store(restore_ptr + b_reading, o_patch // UNIT, mask=m_patch & (o_patch % UNIT == 0))
    b_row = b_token_row * MERGE + b_within % UNIT // MERGE
    b_column = b_token_column * MERGE + b_within % MERGE
    o_channel = tl.arange(0, 128)
    m_angle = m_patch[:, None] & (o_channel < D)[None, :]
    o_pair = o_channel % (D // 2)
    b_position = tl.where((o_pair < D // 4)[None, :], b_row[:, None], b_column[:, None])
    o_table = b_position * (D // 4) + (o_pair % (D // 4))[None, :]
    o_angle = o_patch[:, None] * D + o_channel[None, :]
    tl.store(cos_ptr + o_angle, tl.load(cos_table_ptr + o_table, mask=m_angle, other=0.0), mask=m_angle)
    tl.store(sin_ptr + o_angle, tl.load(sin_table_ptr + o_table, mask=m_angle, other=0.0), mask=m_angle)
    if taps_ptr is not None:
        b_low_row, b_row_weight = _resample(b_row, b_height, TABLE_SIDE)
        b_low_column, b_column_weight = _resample(b_column, b_width, TABLE_SIDE)
        for i_tap in tl.static_range(4):
            b_tap_row = b_low_row
            b_tap_column = b_low_column
            b_weight = 1.0 - b_row_weight
            if i_tap // 2 == 0:
                b_weight = b_row_weight
            else:
                b_tap_row = tl.minimum(b_low_row + 1, TABLE_SIDE - 1)
            if i_tap % 2 == 0:
                b_weight *= b_column_weight
            else:
                b_weight *= 1.0 - b_column_weight
                b_tap_column = tl.minimum(b_low_column + 1, TABLE_SIDE - 1)
            tl.store(taps_ptr + o_patch * 4 + i_tap, b_tap_row * TABLE_SIDE + b_tap_column, mask=m_patch)
            tl.store(tap_weights_ptr + o_patch * 4 + i_tap, b_weight, mask=m_patch)


@triton.jit
def _resample(b_index, b_size, TABLE_SIDE: tl.constexpr):
    """Lower neighbour in a table of TABLE_SIDE entries, corners aligned, and its weight; rounded as in `GridPlan`."""
    b_at = tl.div_rn(b_index.to(tl.float32) * (TABLE_SIDE - 1), tl.maximum(b_size - 1, 1).to(tl.float32))
    b_low = tl.floor(b_at)
    return b_low.to(tl.int64), 1.0 - (b_at - b_low)


@triton.jit(do_not_specialize=["n_items", "n_segments"])
def _bound_segments(
    table_ptr,  # int64, shape (n_items + 1, 5)
    bounds_ptr,  # int32, shape (n_segments + 1,)
    n_items,
    n_segments,
    MERGE: tl.constexpr,
    SIDE: tl.constexpr,  # None: segments are frames, else windows of SIDE x SIDE tokens
    BLOCK: tl.constexpr,
):
    UNIT: tl.constexpr = MERGE * MERGE
    COLUMN: tl.constexpr = 1 if SIDE is None else 2
    o_segment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_real = o_segment < _column(table_ptr, n_items, COLUMN)
    b_segment = tl.where(m_real, o_segment, 0)
    b_item = _item_of(table_ptr, n_items, b_segment, COLUMN)
    b_height = _column(table_ptr, b_item, 3)
    b_width = _column(table_ptr, b_item, 4)
    b_frame = b_segment - _column(table_ptr, b_item, COLUMN)
    b_start = _column(table_ptr, b_item, 0)
    if SIDE is not None:
        b_rows = b_height // MERGE
        b_columns = b_width // MERGE
        n_windows = ((b_rows + SIDE - 1) // SIDE) * ((b_columns + SIDE - 1) // SIDE)
        b_start += _window_start(b_frame % n_windows, b_rows, b_columns, SIDE) * UNIT
        b_frame = b_frame // n_windows
    b_start += b_frame * b_height * b_width
    b_start = tl.where(m_real, b_start, _column(table_ptr, n_items, 0))
    tl.store(bounds_ptr + o_segment, b_start.to(tl.int32), mask=o_segment <= n_segments)


def launch_grid_plan(
    table: Tensor, cos_table: Tensor, sin_table: Tensor, patches: int, frames: int, windows: int, merge: int, side: int,
    table_side: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """See `qwenvit.ops.grid_plan`."""
    n_items, head_dim = len(table) - 1, 4 * cos_table.shape[1]
    cos = cos_table.new_empty((patches, head_dim))
    sin = torch.empty_like(cos)
    frame_bounds = table.new_empty((frames + 1,), dtype=torch.int32)
    window_bounds = restore = taps = tap_weights = None
    if side:
        restore = table.new_empty((patches // merge**2,))
        window_bounds = table.new_empty((windows + 1,), dtype=torch.int32)
    if table_side:
        taps, tap_weights = table.new_empty((patches, 4)), cos_table.new_empty((patches, 4))
    with torch.cuda.device_of(table):  # Triton launches on the current device, which need not be the tensor's
        _place_patches[(triton.cdiv(patches, BLOCK),)](
            table, cos_table, sin_table, cos, sin, restore, taps, tap_weights, n_items, patches,
            D=head_dim, MERGE=merge, SIDE=side, TABLE_SIDE=table_side, BLOCK=BLOCK,
        )  # fmt: skip
        _bound_segments[(frames // BLOCK + 1,)](
            table, frame_bounds, n_items, frames, MERGE=merge, SIDE=None, BLOCK=BLOCK
        )
        if window_bounds is not None:
            grid = (windows // BLOCK + 1,)
            _bound_segments[grid](table, window_bounds, n_items, windows, MERGE=merge, SIDE=side, BLOCK=BLOCK)
    return cos, sin, frame_bounds, window_bounds, restore, taps, tap_weights
