"""Resize 8-bit frames, normalise them and cut them into patches: from decoded bytes to the tower's input.

Pillow and torch resize 8-bit images by two passes, one along each axis, in fixed point: a result is a sum of pixels
times integer weights, shifted right and clamped to 8 bits. The host computes the weights (`qwenvit.ops.resampling`),
integers add up to the same sum in any order, so the bytes equal theirs. A byte has only 256 values, so normalising it
is a table lookup, and equals the host's arithmetic whatever that is.

Strides are 64-bit, so large images do not overflow, and no size compiles a kernel of its own.

The first kernel runs the first pass. The second kernel runs the second pass, and writes the normalised values where the
tower reads them, in merge-block order. Patches of a still are computed once and stored for each of their frames.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS

ROW_BLOCK = 512
"""Elements of a row that a program of `_resize_rows` writes (TUNING.md)."""
PATCHES_PER_PROGRAM = 4
VALUES_PER_STEP = 128
"""Patches of a program of `_resize_to_patches`, and how many values of each it computes at a time (TUNING.md)."""


@triton.jit
def _weighted_byte(
    p_x,  # pointers to the first pixels
    o_table,  # offsets of the table's rows
    table_ptr,
    taps,
    stride,  # from one pixel to the next along the resized axis
    precision,
    mask,
):
    b_sum = tl.zeros(p_x.shape, tl.int32) + (1 << (precision - 1))
    for i_tap in range(taps):
        b_weight = tl.load(table_ptr + o_table + 1 + i_tap, mask=mask, other=0)
        b_sum += b_weight * tl.load(p_x, mask=mask, other=0).to(tl.int32)
        p_x += stride
    return tl.minimum(tl.maximum(b_sum >> precision, 0), 255)


@triton.jit(do_not_specialize=["H_OUT", "W_OUT", "taps", "precision", "stride_f", "stride_c", "stride_y", "stride_x"])
def _resize_rows(
    x_ptr,  # shape (F, 3, H_IN, W_IN), any strides
    y_ptr,  # shape (F, 3, H_OUT, W_OUT), contiguous
    table_ptr,  # shape (H_OUT or W_OUT, 1 + taps): the first pixel and the weights of each result
    H_OUT,
    W_OUT,
    taps,
    precision,
    stride_f,
    stride_c,
    stride_y,
    stride_x,
    VERTICAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    stride_y, stride_x = tl.cast(stride_y, tl.int64), tl.cast(stride_x, tl.int64)
    i_row = tl.program_id(0)  # row of the result, counted through channels and frames
    i_plane = i_row // H_OUT
    i_y = i_row % H_OUT
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < W_OUT
    p_plane = x_ptr + (i_plane // 3).to(tl.int64) * stride_f + (i_plane % 3).to(tl.int64) * stride_c
    if VERTICAL:
        o_table = i_y * (1 + taps) + tl.zeros([BLOCK], tl.int32)
        p_x = p_plane + tl.load(table_ptr + i_y * (1 + taps)) * stride_y + o_x * stride_x
        b_y = _weighted_byte(p_x, o_table, table_ptr, taps, stride_y, precision, m_x)
    else:
        o_table = o_x * (1 + taps)
        p_x = p_plane + i_y * stride_y + tl.load(table_ptr + o_table, mask=m_x, other=0) * stride_x
        b_y = _weighted_byte(p_x, o_table, table_ptr, taps, stride_x, precision, m_x)
    tl.store(y_ptr + i_row.to(tl.int64) * W_OUT + o_x, b_y.to(tl.uint8), mask=m_x)


@triton.jit(
    do_not_specialize=[
        "F",
        "ROWS",
        "COLUMNS",
        "PATCHES",
        "taps",
        "precision",
        "stride_f",
        "stride_c",
        "stride_y",
        "stride_x",
    ]
)
def _resize_to_patches(
    x_ptr,  # shape (F, 3, H_IN, W_IN), any strides
    table_ptr,  # shape (H_OUT or W_OUT, 1 + taps): the first pixel and the weights of each result
    levels_ptr,  # shape (3, 256): the normalised value of each byte
    out_ptr,  # shape (PATCHES, 3 * T * P * P), unit stride in the last dimension
    F,
    ROWS,  # rows of merged tokens
    COLUMNS,  # columns of merged tokens
    PATCHES,
    taps,
    precision,
    stride_f,
    stride_c,
    stride_y,
    stride_x,
    stride_out,
    VERTICAL: tl.constexpr,
    STILL: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    stride_y, stride_x = tl.cast(stride_y, tl.int64), tl.cast(stride_x, tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_token = o_n // (M * M)
    i_row = i_token // COLUMNS  # row of tokens, counted through groups of frames
    o_y0 = (i_row % ROWS * M + o_n // M % M) * P  # [BLOCK_N], the patch's upper left pixel
    o_x0 = (i_token % COLUMNS * M + o_n % M) * P
    i_t = i_row // ROWS
    NUM_VALUES: tl.constexpr = 3 * P * P if STILL else 3 * T * P * P
    for i_step in range(tl.cdiv(NUM_VALUES, BLOCK_V)):
        o_v = i_step * BLOCK_V + tl.arange(0, BLOCK_V)
        m_v = (o_n < PATCHES)[:, None] & (o_v < NUM_VALUES)[None, :]
        if STILL:
            i_c = o_v // (P * P)
            i_frame = tl.zeros([BLOCK_N, BLOCK_V], tl.int32)
        else:
            i_c = o_v // (T * P * P)
            i_frame = tl.minimum(i_t[:, None] * T + (o_v // (P * P) % T)[None, :], F - 1)
        o_y = o_y0[:, None] + (o_v // P % P)[None, :]  # [BLOCK_N, BLOCK_V]
        o_x = o_x0[:, None] + (o_v % P)[None, :]
        p_plane = x_ptr + i_frame.to(tl.int64) * stride_f + i_c.to(tl.int64)[None, :] * stride_c
        if VERTICAL:
            o_table = o_y * (1 + taps)
            p_x = p_plane + tl.load(table_ptr + o_table, mask=m_v, other=0) * stride_y + o_x * stride_x
            b_byte = _weighted_byte(p_x, o_table, table_ptr, taps, stride_y, precision, m_v)
        else:
            o_table = o_x * (1 + taps)
            p_x = p_plane + o_y * stride_y + tl.load(table_ptr + o_table, mask=m_v, other=0) * stride_x
            b_byte = _weighted_byte(p_x, o_table, table_ptr, taps, stride_x, precision, m_v)
        b_value = tl.load(levels_ptr + i_c[None, :] * 256 + b_byte, mask=m_v)
        p_out = out_ptr + o_n.to(tl.int64)[:, None] * stride_out
        if STILL:
            for i_frame_of_patch in tl.static_range(T):
                o_out = o_v + (i_c * (T - 1) + i_frame_of_patch) * (P * P)
                tl.store(p_out + o_out[None, :], b_value, mask=m_v)
        else:
            tl.store(p_out + o_v[None, :], b_value, mask=m_v)


def resize_patches(
    frames: Tensor,
    passes: list[tuple[bool, int, Tensor]],
    levels: Tensor,
    out: Tensor,
    grid: tuple[int, int, int],
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
) -> None:
    """Write the patches of resized frames to `out`; see `qwenvit.ops.resize_patches`.

    I/O: reads the frames, writes and reads as many bytes as the frames have after the first pass, writes `out`.

    Args:
        frames: `[F, 3, H, W]` uint8.
        passes: one or two: whether the pass is vertical, its precision in bits and its table `[size, 1 + taps]` int32.
        levels: `[3, 256]`.
        out: `[patches, 3·T·P·P]` in the dtype of `levels`.
        grid: groups of frames, rows and columns of patches.
        patch_size: P.
        temporal_patch_size: T.
        merge_size: side of a merged token in patches.
    """
    num_frames, _, height, width = frames.shape
    groups, rows, columns = grid
    with torch.cuda.device_of(frames):  # Triton launches on the current device, which need not be the tensor's
        for vertical, precision, table in passes[:-1]:
            size, taps = table.shape[0], table.shape[1] - 1
            height, width = (size, width) if vertical else (height, size)
            resized = frames.new_empty((num_frames, 3, height, width))
            _resize_rows[(num_frames * 3 * height, triton.cdiv(width, ROW_BLOCK))](
                frames,
                resized,
                table,
                height,
                width,
                taps,
                precision,
                *frames.stride(),
                VERTICAL=vertical,
                BLOCK=ROW_BLOCK,
                **COMPILE_OPTIONS,
            )
            frames = resized
        vertical, precision, table = passes[-1]
        patches = groups * rows * columns
        _resize_to_patches[(triton.cdiv(patches, PATCHES_PER_PROGRAM),)](
            frames,
            table,
            levels,
            out,
            num_frames,
            rows // merge_size,
            columns // merge_size,
            patches,
            table.shape[1] - 1,
            precision,
            *frames.stride(),
            out.stride(0),
            VERTICAL=vertical,
            STILL=num_frames == 1,
            P=patch_size,
            T=temporal_patch_size,
            M=merge_size,
            BLOCK_N=PATCHES_PER_PROGRAM,
            BLOCK_V=VALUES_PER_STEP,
            **COMPILE_OPTIONS,
        )
