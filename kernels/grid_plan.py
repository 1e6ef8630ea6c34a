"""What a tower needs to know of its grids: RoPE angles, window order, segments and taps in the learned position table.

Each value of a patch is a closed form of the patch's place in the tower's order. Bisecting a table of running sums
finds the patch's item; division gives its frame, window, token and place in the token. So one launch serves every batch
of grids that fits a capacity, and one captured CUDA graph replays for all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS

COLUMNS = tl.constexpr(5)
"""Columns of the table of items (`qwenvit.graphs.device_plan.grid_table`); the next five constants number them."""
FIRST_PATCH = tl.constexpr(0)
"""Patches before the item."""
FIRST_FRAME = tl.constexpr(1)
"""Frames before the item."""
FIRST_WINDOW = tl.constexpr(2)
"""Windows before the item."""
HEIGHT = tl.constexpr(3)
"""Rows of patches in a frame of the item."""
WIDTH = tl.constexpr(4)
"""Columns of patches in a frame of the item."""
BLOCK = 64


@triton.jit
def _load_column(
    table_ptr,  # int64, shape (n_items + 1, COLUMNS)
    b_item,
    COLUMN: tl.constexpr,
):
    return tl.load(table_ptr + b_item * COLUMNS + COLUMN)


@triton.jit
def _find_item(
    table_ptr,  # int64, shape (n_items + 1, COLUMNS)
    n_items,
    b_index,
    COLUMN: tl.constexpr,
):
    """Find the last item whose COLUMN (FIRST_PATCH, FIRST_FRAME or FIRST_WINDOW) is at most `b_index`."""
    b_item = b_index * 0
    b_end = b_item + n_items
    n_candidates = n_items
    while n_candidates > 1:
        b_middle = (b_item + b_end) // 2
        in_upper_half = _load_column(table_ptr, b_middle, COLUMN) <= b_index
        b_item = tl.where(in_upper_half, b_middle, b_item)
        b_end = tl.where(in_upper_half, b_end, b_middle)
        n_candidates = (n_candidates + 1) // 2
    return b_item


@triton.jit
def _window_first_token(b_window, b_height, b_width, WINDOW_SIDE: tl.constexpr):
    """First token of a window, in a frame of `b_height` x `b_width` tokens whose windows are in reading order."""
    n_across = (b_width + WINDOW_SIDE - 1) // WINDOW_SIDE
    b_row = b_window // n_across * WINDOW_SIDE
    return b_row * b_width + b_window % n_across * WINDOW_SIDE * tl.minimum(WINDOW_SIDE, b_height - b_row)


@triton.jit(do_not_specialize=["n_items", "n_patches"])
def _plan_patches(
    table_ptr,  # int64, shape (n_items + 1, COLUMNS); the last row has the totals
    cos_table_ptr,  # fp32, shape (positions, D / 4)
    sin_table_ptr,  # fp32, shape (positions, D / 4)
    cos_ptr,  # fp32, shape (n_patches, D)
    sin_ptr,  # fp32, shape (n_patches, D)
    restore_ptr,  # int64, shape (n_patches / MERGE²,); None in towers without windows
    taps_ptr,  # int64, shape (n_patches, 4); None in towers without learned positions
    tap_weights_ptr,  # fp32, shape (n_patches, 4); None in towers without learned positions
    n_items,
    n_patches,
    D: tl.constexpr,
    MERGE: tl.constexpr,
    WINDOW_SIDE: tl.constexpr,
    TABLE_SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MERGE_UNIT: tl.constexpr = MERGE * MERGE  # patches in a token
    o_patch = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_patch = o_patch < n_patches
    m_real = o_patch < _load_column(table_ptr, n_items, FIRST_PATCH)  # the rest is spare capacity
    b_patch = tl.where(m_real, o_patch, 0)
    b_item = _find_item(table_ptr, n_items, b_patch, FIRST_PATCH)
    b_height = _load_column(table_ptr, b_item, HEIGHT)
    b_width = _load_column(table_ptr, b_item, WIDTH)
    b_in_frame = (b_patch - _load_column(table_ptr, b_item, FIRST_PATCH)) % (b_height * b_width)
    b_frame_start = b_patch - b_in_frame
    b_token = b_in_frame // MERGE_UNIT  # in its frame, in the tower's order
    b_tokens_across = b_width // MERGE
    b_token_row = b_token // b_tokens_across
    b_token_column = b_token % b_tokens_across
    if restore_ptr is not None:
        # A band is all windows of the same rows. The grid cuts off the last band and the last window of each band.
        b_band_row = b_token // (WINDOW_SIDE * b_tokens_across) * WINDOW_SIDE
        n_rows = tl.minimum(WINDOW_SIDE, b_height // MERGE - b_band_row)
        b_in_band = b_token - b_band_row * b_tokens_across
        b_window_column = b_in_band // (n_rows * WINDOW_SIDE) * WINDOW_SIDE
        n_columns = tl.minimum(WINDOW_SIDE, b_tokens_across - b_window_column)
        b_in_window = b_in_band - b_window_column * n_rows
        b_token_row = b_band_row + b_in_window // n_columns
        b_token_column = b_window_column + b_in_window % n_columns
        b_reading_token = b_frame_start // MERGE_UNIT + b_token_row * b_tokens_across + b_token_column
        b_reading_token = tl.where(m_real, b_reading_token, o_patch // MERGE_UNIT)
        tl.store(restore_ptr + b_reading_token, o_patch // MERGE_UNIT, mask=m_patch & (o_patch % MERGE_UNIT == 0))
    b_row = b_token_row * MERGE + b_in_frame % MERGE_UNIT // MERGE
    b_column = b_token_column * MERGE + b_in_frame % MERGE
    o_channel = tl.arange(0, 128)
    m_angle = m_patch[:, None] & (o_channel < D)[None, :]
    o_pair = o_channel % (D // 2)
    b_position = tl.where((o_pair < D // 4)[None, :], b_row[:, None], b_column[:, None])
    o_table = b_position * (D // 4) + (o_pair % (D // 4))[None, :]
    o_angle = o_patch[:, None] * D + o_channel[None, :]
    tl.store(cos_ptr + o_angle, tl.load(cos_table_ptr + o_table, mask=m_angle, other=0.0), mask=m_angle)
    tl.store(sin_ptr + o_angle, tl.load(sin_table_ptr + o_table, mask=m_angle, other=0.0), mask=m_angle)
    if taps_ptr is not None:
        b_low_row, b_row_weight = _lower_neighbour(b_row, b_height, TABLE_SIDE)
        b_low_column, b_column_weight = _lower_neighbour(b_column, b_width, TABLE_SIDE)
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
def _lower_neighbour(b_index, b_size, TABLE_SIDE: tl.constexpr):
    """Return the lower neighbour of a patch among TABLE_SIDE table entries, and that entry's bilinear weight.

    The corners of the grid and of the table coincide. Every step rounds as in `GridPlan`.
    """
    b_coordinate = tl.div_rn(b_index.to(tl.float32) * (TABLE_SIDE - 1), tl.maximum(b_size - 1, 1).to(tl.float32))
    b_low = tl.floor(b_coordinate)
    return b_low.to(tl.int64), 1.0 - (b_coordinate - b_low)


@triton.jit(do_not_specialize=["n_items", "n_segments"])
def _plan_segments(
    table_ptr,  # int64, shape (n_items + 1, COLUMNS); the last row has the totals
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    n_items,
    n_segments,
    MERGE: tl.constexpr,
    WINDOW_SIDE: tl.constexpr,  # None: segments are frames; else windows of WINDOW_SIDE x WINDOW_SIDE tokens
    BLOCK: tl.constexpr,
):
    MERGE_UNIT: tl.constexpr = MERGE * MERGE  # patches in a token
    COLUMN: tl.constexpr = FIRST_FRAME if WINDOW_SIDE is None else FIRST_WINDOW
    o_segment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_real = o_segment < _load_column(table_ptr, n_items, COLUMN)
    b_segment = tl.where(m_real, o_segment, 0)
    b_item = _find_item(table_ptr, n_items, b_segment, COLUMN)
    b_height = _load_column(table_ptr, b_item, HEIGHT)
    b_width = _load_column(table_ptr, b_item, WIDTH)
    b_frame = b_segment - _load_column(table_ptr, b_item, COLUMN)
    b_start = _load_column(table_ptr, b_item, FIRST_PATCH)
    if WINDOW_SIDE is not None:
        b_rows = b_height // MERGE
        b_columns = b_width // MERGE
        n_windows = ((b_rows + WINDOW_SIDE - 1) // WINDOW_SIDE) * ((b_columns + WINDOW_SIDE - 1) // WINDOW_SIDE)
        b_start += _window_first_token(b_frame % n_windows, b_rows, b_columns, WINDOW_SIDE) * MERGE_UNIT
        b_frame = b_frame // n_windows
    b_start += b_frame * b_height * b_width
    b_start = tl.where(m_real, b_start, _load_column(table_ptr, n_items, FIRST_PATCH))
    tl.store(cu_seqlens_ptr + o_segment, b_start.to(tl.int32), mask=o_segment <= n_segments)


def launch_grid_plan(
    table: Tensor, cos_table: Tensor, sin_table: Tensor, patches: int, frames: int, windows: int, merge: int,
    window_side: int, table_side: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute a grid plan on the GPU; `qwenvit.ops.grid_plan` describes the tensors.

    Args:
        table: `[items + 1, 5]` int64.
        cos_table: `[positions, D / 4]` fp32.
        sin_table: `[positions, D / 4]` fp32.
        patches: capacity for patches.
        frames: capacity for frames.
        windows: capacity for windows.
        merge: patches along a side of a token.
        window_side: tokens along a side of a window; 0 in towers without windows.
        table_side: entries along a side of the learned position table; 0 in towers without learned positions.

    Returns:
        cos, sin, cu_seqlens of frames, cu_seqlens of windows, restore_index, taps and tap_weights. None instead of
        tensors that the tower does not use.
    """
    n_items, head_dim = len(table) - 1, 4 * cos_table.shape[1]
    cos = cos_table.new_empty((patches, head_dim))
    sin = torch.empty_like(cos)
    frame_cu_seqlens = table.new_empty((frames + 1,), dtype=torch.int32)
    window_cu_seqlens = restore_index = taps = tap_weights = None
    if window_side:
        restore_index = table.new_empty((patches // merge**2,))
        window_cu_seqlens = table.new_empty((windows + 1,), dtype=torch.int32)
    if table_side:
        taps, tap_weights = table.new_empty((patches, 4)), cos_table.new_empty((patches, 4))
    with torch.cuda.device_of(table):  # Triton launches on the current device, which need not be the tensor's
        _plan_patches[(triton.cdiv(patches, BLOCK),)](
            table, cos_table, sin_table, cos, sin, restore_index, taps, tap_weights, n_items, patches,
            D=head_dim, MERGE=merge, WINDOW_SIDE=window_side, TABLE_SIDE=table_side, BLOCK=BLOCK, **COMPILE_OPTIONS,
        )  # fmt: skip
        _plan_segments[(frames // BLOCK + 1,)](
            table, frame_cu_seqlens, n_items, frames, MERGE=merge, WINDOW_SIDE=None, BLOCK=BLOCK, **COMPILE_OPTIONS
        )
        if window_cu_seqlens is not None:
            _plan_segments[(windows // BLOCK + 1,)](
                table, window_cu_seqlens, n_items, windows,
                MERGE=merge, WINDOW_SIDE=window_side, BLOCK=BLOCK, **COMPILE_OPTIONS,
            )  # fmt: skip
    return cos, sin, frame_cu_seqlens, window_cu_seqlens, restore_index, taps, tap_weights
