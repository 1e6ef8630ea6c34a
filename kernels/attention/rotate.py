"""Rotary position embedding: tile functions for attention within windows, and a pass for longer segments.

A head's D channels are D/2 pairs. Pair i is channels (i, i + D/2), or channels (2i, 2i + 1) if the rows of the
projection's weights were permuted to that order (INTERLEAVED). One tile has 32 pairs; a second has the 4 or 8 more of
head_dim 72 and 80. Tile sizes are powers of two, so one tile for 36 or 40 pairs would take 64.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS


@triton.jit
def load_angles(
    cos_ptr,  # shape (S, D / 2 or D), at the tile's first row; a second half repeats the first and is not read
    sin_ptr,  # shape (S, D / 2 or D), at the tile's first row; a second half repeats the first and is not read
    o_row,
    m_row,
    D: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,  # constexpr: an argument that is no multiple of 16 prevents vector loads
    FIRST_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Return cosines and sines of pairs FIRST_PAIR .. FIRST_PAIR + PAIRS in fp32, [rows, PAIRS] each."""
    o_pair = FIRST_PAIR + tl.arange(0, PAIRS)
    mask = m_row[:, None]
    if FIRST_PAIR + PAIRS > D // 2:
        mask = mask & (o_pair < D // 2)[None, :]
    offset = o_row[:, None] * ANGLE_STRIDE + o_pair[None, :]
    b_cos = tl.load(cos_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return b_cos, tl.load(sin_ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_pairs(
    x_ptr,  # shape (rows, D), at the tile's first row and the head's first channel
    o_x,  # offset of each row
    m_row,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FIRST_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Return the first and the second members of pairs FIRST_PAIR .. FIRST_PAIR + PAIRS, [rows, PAIRS] each."""
    mask = m_row[:, None]
    if INTERLEAVED:
        o_channel = 2 * FIRST_PAIR + tl.arange(0, 2 * PAIRS)
        if 2 * (FIRST_PAIR + PAIRS) > D:
            mask = mask & (o_channel < D)[None, :]
        b_x = tl.load(x_ptr + (o_x[:, None] + o_channel[None, :]), mask=mask, other=0.0)
        b_a, b_b = tl.split(tl.reshape(b_x, [b_x.shape[0], PAIRS, 2]))
    else:
        o_channel = FIRST_PAIR + tl.arange(0, PAIRS)
        if FIRST_PAIR + PAIRS > D // 2:
            mask = mask & (o_channel < D // 2)[None, :]
        offset = o_x[:, None] + o_channel[None, :]
        b_a = tl.load(x_ptr + offset, mask=mask, other=0.0)
        b_b = tl.load(x_ptr + D // 2 + offset, mask=mask, other=0.0)
    return b_a, b_b


@triton.jit
def rotate_pairs(b_a, b_b, b_cos, b_sin):
    """Return both members of each pair, rotated in fp32 and rounded once."""
    b_x = b_a.to(tl.float32)
    b_y = b_b.to(tl.float32)
    return (b_x * b_cos - b_y * b_sin).to(b_a.dtype), (b_y * b_cos + b_x * b_sin).to(b_a.dtype)


@triton.jit
def load_rotated(
    x_ptr,  # shape (rows, D), at the tile's first row and the head's first channel
    o_x,  # offset of each row
    m_row,
    b_cos,  # [rows, PAIRS]
    b_sin,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FIRST_PAIR: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Return a rotated tile [rows, 2 * PAIRS] of queries or keys, the members of each pair side by side.

    Queries and keys have the same order of channels, so their products are those of the original order.
    """
    b_a, b_b = load_pairs(x_ptr, o_x, m_row, D, INTERLEAVED, FIRST_PAIR, PAIRS)
    b_a, b_b = rotate_pairs(b_a, b_b, b_cos, b_sin)
    return tl.reshape(tl.join(b_a, b_b), [b_a.shape[0], 2 * PAIRS])


@triton.jit
def _rotate_tile(
    x_ptr,  # shape (S, H, D), at the program's first row and head
    out_ptr,  # shape (H, S, CHANNELS), at the program's first row and head
    cos_ptr,  # shape (S, D / 2 or D), at the program's first row
    sin_ptr,  # shape (S, D / 2 or D), at the program's first row
    o_x,
    o_out,
    o_row,
    m_row,
    is_value,
    D: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Copy CHANNELS channels of a tile from FIRST_CHANNEL on: values with ones past D, others rotated, with zeros."""
    mask = m_row[:, None]
    o_channel = tl.arange(0, CHANNELS)
    o_pair = tl.arange(0, CHANNELS // 2)
    p_out = out_ptr + (o_out * CHANNELS)[:, None]
    if is_value:
        m_x = mask & (FIRST_CHANNEL + o_channel < D)[None, :]
        b_x = tl.load(x_ptr + FIRST_CHANNEL + (o_x[:, None] + o_channel[None, :]), mask=m_x, other=1.0)
        tl.store(p_out + o_channel[None, :], b_x, mask=mask)
    else:
        b_cos, b_sin = load_angles(cos_ptr, sin_ptr, o_row, m_row, D, ANGLE_STRIDE, FIRST_CHANNEL // 2, CHANNELS // 2)
        if INTERLEAVED:
            b_x = load_rotated(x_ptr, o_x, m_row, b_cos, b_sin, D, True, FIRST_CHANNEL // 2, CHANNELS // 2)
            tl.store(p_out + o_channel[None, :], b_x, mask=mask)
        else:
            b_a, b_b = load_pairs(x_ptr, o_x, m_row, D, False, FIRST_CHANNEL // 2, CHANNELS // 2)
            b_a, b_b = rotate_pairs(b_a, b_b, b_cos, b_sin)
            tl.store(p_out + o_pair[None, :], b_a, mask=mask)
            tl.store(p_out + CHANNELS // 2 + o_pair[None, :], b_b, mask=mask)


@triton.jit(do_not_specialize=["S"])
def _rotate_by_head(
    q_ptr,  # shape (S, H, D)
    k_ptr,  # shape (S, H, D)
    v_ptr,  # shape (S, H, D); not read if the grid has programs for q and k only
    out_ptr,  # shape (2 or 3, H, S, 64)
    rest_ptr,  # shape (2 or 3, H, S, 16)
    cos_ptr,  # shape (S, D / 2 or D)
    sin_ptr,  # shape (S, D / 2 or D)
    stride_qs,  # this and the next five in units of STRIDE_UNIT elements
    stride_qh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    S,
    H,
    D: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    n_groups = tl.cdiv(H, HEADS)
    i_tensor = tl.program_id(1) // n_groups
    i_head = (tl.program_id(1) % n_groups * HEADS).to(tl.int64)
    x_ptr = q_ptr
    if i_tensor == 1:
        x_ptr = k_ptr
        stride_qs = stride_ks
        stride_qh = stride_kh
    elif i_tensor == 2:
        x_ptr = v_ptr
        stride_qs = stride_vs
        stride_qh = stride_vh
    # Rows and heads share one axis: repeated loads of the angles hit L1, and no store delays another head's loads.
    o_row = tl.arange(0, ROWS * HEADS) // HEADS
    o_head = tl.arange(0, ROWS * HEADS) % HEADS
    m_row = (o_row < S - i_row) & (o_head < H - i_head)
    x_ptr += (i_row * stride_qs + i_head * stride_qh) * STRIDE_UNIT
    cos_ptr += i_row * ANGLE_STRIDE
    sin_ptr += i_row * ANGLE_STRIDE
    i_out = (i_tensor * H + i_head) * S + i_row
    out_ptr += i_out * 64
    rest_ptr += i_out * 16
    o_x = (o_row * stride_qs + o_head * stride_qh) * STRIDE_UNIT
    o_out = o_head.to(tl.int64) * S + o_row
    is_value = i_tensor == 2
    _rotate_tile(
        x_ptr, out_ptr, cos_ptr, sin_ptr, o_x, o_out, o_row, m_row, is_value, D, ANGLE_STRIDE, INTERLEAVED, 0, 64
    )
    if D > 64:
        _rotate_tile(
            x_ptr, rest_ptr, cos_ptr, sin_ptr, o_x, o_out, o_row, m_row, is_value, D, ANGLE_STRIDE, INTERLEAVED, 64, 16
        )


@dataclass(frozen=True)
class RotateConfig:
    """Rows, heads and warps per program."""

    rows: int
    heads: int
    num_warps: int


ROTATE = RotateConfig(rows=8, heads=16, num_warps=4)
"""The fastest of eight shapes on an H200 (TUNING.md)."""


def stride_unit(*tensors: Tensor) -> int:
    """Return the number of elements that strides are counted in: 16 bytes' worth if all rows are so aligned, else 1.

    Triton itself detects only strides that are multiples of 16 elements, which those of head_dim 72 are not.
    """
    elements = 16 // tensors[0].element_size()
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    aligned = all(x.data_ptr() % 16 == 0 for x in tensors) and all(stride % elements == 0 for stride in strides)
    return elements if aligned else 1


def with_small_strides(x: Tensor) -> Tensor:
    """Return `x [S, H, D]`, copied if its strides are so large that offsets inside a tile could pass 2³¹."""
    return x if max(x.stride()) < 2**24 else x.contiguous()


def split_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the first 64 channels of `x [S, H, D]` and of the others."""
    return x[..., :64], x[..., 64:]


def rotate_by_head(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return queries and keys `[S, H, D]` rotated, and the values, each as two tensors, in one launch.

    `cos` and `sin` are `[S, D / 2]` or `[S, D]` in any floating dtype, of one row stride; the first half of a row is
    read, and computed with in fp32.

    The two are `[S, H, 64]` and, for D > 64, `[S, H, 16]` with the other channels, both stored head by head: so rows
    fill whole sectors of 32 bytes, and neighbouring rows fill cache lines. Past D queries and keys have zeros, and
    values ones. Queries and keys have their channels in another order, the same for both. Values are copied only if
    their rows do not fill sectors (72 channels in 16 bits); otherwise they are views. I/O: reads and writes Q and K
    once, and V if it is copied.
    """
    S, H, D = q.shape
    n_tensors = 2 if v.shape[2] * v.element_size() % 32 == 0 else 3
    q, k, v = with_small_strides(q), with_small_strides(k), with_small_strides(v)
    out, out_rest = q.new_empty(n_tensors, H, S, 64), q.new_empty(n_tensors, H, S, 0 if D == 64 else 16)
    unit = stride_unit(q, k, v)
    strides = [stride // unit for x in (q, k, v) for stride in x.stride()[:2]]
    _rotate_by_head[(triton.cdiv(S, ROTATE.rows), n_tensors * triton.cdiv(H, ROTATE.heads))](
        q, k, v, out, out_rest, cos, sin, *strides, S, H,
        D=D, STRIDE_UNIT=unit, ANGLE_STRIDE=cos.stride(0), INTERLEAVED=interleaved,
        ROWS=ROTATE.rows, HEADS=ROTATE.heads, num_warps=ROTATE.num_warps, **COMPILE_OPTIONS,
    )  # fmt: skip
    pairs = list(zip(out.transpose(1, 2), out_rest.transpose(1, 2), strict=True))
    return pairs if n_tensors == 3 else [*pairs, split_channels(v)]
