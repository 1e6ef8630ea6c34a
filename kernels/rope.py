"""Rotary position embedding: the tile functions that attention over windows rotates with, and a pass that only rotates.

A head's D channels are D/2 pairs. Pair i is channels (i, i + D/2), or (2i, 2i + 1) where the rows of the projection's
weights were permuted so (`INTERLEAVED`). A tile holds 32 pairs, another the 4 or 8 that head_dim 72 and 80 have more:
powers of two, so nothing is padded in memory, and 36 or 40 pairs cost a tile of 8 instead of one of 64.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_angles(
    cos_ptr,  # fp32, shape (S, D), at the tile's first row; the second half repeats the first and is not read
    sin_ptr,  # same
    o_row,
    m_row,
    D: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,  # a constant: 36 and 40 are no multiples of 16, so an argument would not vectorise
    FIRST: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Cosines and sines of pairs FIRST .. FIRST + PAIRS: [rows, PAIRS] each."""
    o_pair = FIRST + tl.arange(0, PAIRS)
    mask = m_row[:, None]
    if FIRST + PAIRS > D // 2:
        mask = mask & (o_pair < D // 2)[None, :]
    offset = o_row[:, None] * ANGLE_STRIDE + o_pair[None, :]
    return tl.load(cos_ptr + offset, mask=mask, other=0.0), tl.load(sin_ptr + offset, mask=mask, other=0.0)


@triton.jit
def load_pairs(
    x_ptr,  # shape (rows, D), at the tile's first row and the head's first channel
    o_first,  # offset of each row
    m_row,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FIRST: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The two members of pairs FIRST .. FIRST + PAIRS: [rows, PAIRS] each."""
    mask = m_row[:, None]
    if INTERLEAVED:
        o_channel = 2 * FIRST + tl.arange(0, 2 * PAIRS)
        if 2 * (FIRST + PAIRS) > D:
            mask = mask & (o_channel < D)[None, :]
        b_x = tl.load(x_ptr + (o_first[:, None] + o_channel[None, :]), mask=mask, other=0.0)
        b_a, b_b = tl.split(tl.reshape(b_x, [b_x.shape[0], PAIRS, 2]))
    else:
        o_channel = FIRST + tl.arange(0, PAIRS)
        if FIRST + PAIRS > D // 2:
            mask = mask & (o_channel < D // 2)[None, :]
        offset = o_first[:, None] + o_channel[None, :]
        b_a = tl.load(x_ptr + offset, mask=mask, other=0.0)
        b_b = tl.load(x_ptr + D // 2 + offset, mask=mask, other=0.0)
    return b_a, b_b


@triton.jit
def turn(b_a, b_b, b_cos, b_sin):
    """Both members of each pair, rotated in fp32 and rounded once."""
    b_x = b_a.to(tl.float32)
    b_y = b_b.to(tl.float32)
    return (b_x * b_cos - b_y * b_sin).to(b_a.dtype), (b_y * b_cos + b_x * b_sin).to(b_a.dtype)


@triton.jit
def load_rotated(
    x_ptr,  # shape (rows, D), at the tile's first row and the head's first channel
    o_first,  # offset of each row
    m_row,
    b_cos,  # [rows, PAIRS]
    b_sin,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FIRST: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A tile [rows, 2 * PAIRS] of queries or keys, the members of a pair side by side.

    Queries and keys come in the same order of channels, whichever it is, so their products do not notice.
    """
    b_a, b_b = load_pairs(x_ptr, o_first, m_row, D, INTERLEAVED, FIRST, PAIRS)
    b_a, b_b = turn(b_a, b_b, b_cos, b_sin)
    return tl.reshape(tl.join(b_a, b_b), [b_a.shape[0], 2 * PAIRS])


@triton.jit
def _rotate_pairs(
    x_ptr,
    out_ptr,
    o_x,
    o_out,
    m_row,
    b_cos,
    b_sin,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FIRST: tl.constexpr,
    PAIRS: tl.constexpr,
):
    b_a, b_b = load_pairs(x_ptr, o_x, m_row, D, INTERLEAVED, FIRST, PAIRS)
    b_a, b_b = turn(b_a, b_b, b_cos, b_sin)
    mask = m_row[:, None]
    if INTERLEAVED:
        o_channel = 2 * FIRST + tl.arange(0, 2 * PAIRS)
        if 2 * (FIRST + PAIRS) > D:
            mask = mask & (o_channel < D)[None, :]
        b_x = tl.reshape(tl.join(b_a, b_b), [b_a.shape[0], 2 * PAIRS])
        tl.store(out_ptr + (o_out[:, None] + o_channel[None, :]), b_x, mask=mask)
    else:
        o_channel = FIRST + tl.arange(0, PAIRS)
        if FIRST + PAIRS > D // 2:
            mask = mask & (o_channel < D // 2)[None, :]
        offset = o_out[:, None] + o_channel[None, :]
        tl.store(out_ptr + offset, b_a, mask=mask)
        tl.store(out_ptr + D // 2 + offset, b_b, mask=mask)


@triton.jit(do_not_specialize=["S"])
def _rotate(
    x_ptr,  # shape (S, N, D)
    y_ptr,  # same
    x_out_ptr,  # same, contiguous
    y_out_ptr,  # same, contiguous
    cos_ptr,  # fp32, shape (S, D)
    sin_ptr,  # same
    stride_xs,  # this and the next three in UNITs of elements
    stride_xn,
    stride_ys,
    stride_yn,
    S,
    N,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    i_group = tl.program_id(1)
    if i_group >= tl.cdiv(N, HEADS):
        i_group -= tl.cdiv(N, HEADS)
        x_ptr = y_ptr
        x_out_ptr = y_out_ptr
        stride_xs = stride_ys
        stride_xn = stride_yn
    # Rows and heads in one axis: repeated loads of the angles hit L1, and no store holds up another head's loads.
    o_row = tl.arange(0, ROWS * HEADS) // HEADS
    o_head = tl.arange(0, ROWS * HEADS) % HEADS
    i_head = (i_group * HEADS).to(tl.int64)
    m_row = (o_row < S - i_row) & (o_head < N - i_head)
    cos_ptr += i_row * ANGLE_STRIDE
    sin_ptr += i_row * ANGLE_STRIDE
    x_ptr += (i_row * stride_xs + i_head * stride_xn) * UNIT
    x_out_ptr += (i_row * N + i_head) * D
    o_x = (o_row * stride_xs + o_head * stride_xn) * UNIT
    o_out = (o_row * N + o_head) * D
    b_cos, b_sin = load_angles(cos_ptr, sin_ptr, o_row, m_row, D, ANGLE_STRIDE, 0, 32)
    _rotate_pairs(x_ptr, x_out_ptr, o_x, o_out, m_row, b_cos, b_sin, D, INTERLEAVED, 0, 32)
    if D > 64:
        b_cos, b_sin = load_angles(cos_ptr, sin_ptr, o_row, m_row, D, ANGLE_STRIDE, 32, 8)
        _rotate_pairs(x_ptr, x_out_ptr, o_x, o_out, m_row, b_cos, b_sin, D, INTERLEAVED, 32, 8)


@dataclass(frozen=True)
class RotateConfig:
    """Rows and heads a program, and its warps."""

    rows: int
    heads: int
    num_warps: int


ROTATE = RotateConfig(rows=8, heads=16, num_warps=4)
"""Of eight shapes from 4 x 8 to 16 x 16 the fastest on an H200 at S = 4096 and 9216 (14.2 and 30.5 µs for 16 heads of
80 in Q and K, cold cache); the worst was 9 % slower."""


def unit(*tensors: Tensor) -> int:
    """Elements in which strides are counted: 16 bytes' worth where every row starts aligned to that, else one.

    Triton sees by itself only that a stride is a multiple of 16 elements, which head_dim 72's are not.
    """
    elements = 16 // tensors[0].element_size()
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    aligned = all(x.data_ptr() % 16 == 0 for x in tensors) and all(stride % elements == 0 for stride in strides)
    return elements if aligned else 1


def within_reach(x: Tensor) -> Tensor:
    """`x [S, H, D]`, copied if its strides are so large that offsets inside a tile would pass 2³¹."""
    return x if max(x.stride()) < 2**24 else x.contiguous()


def rotate(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys `[S, N, D]` rotated, contiguous, in one launch. I/O: reads both once, writes both once."""
    S, N, D = x.shape
    x, y = within_reach(x), within_reach(y)
    x_out, y_out = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, y))
    size = unit(x, y)
    strides = [stride // size for part in (x, y) for stride in part.stride()[:2]]
    _rotate[(triton.cdiv(S, ROTATE.rows), 2 * triton.cdiv(N, ROTATE.heads))](
        x, y, x_out, y_out, cos, sin, *strides, S, N,
        D=D, UNIT=size, ANGLE_STRIDE=cos.stride(0), INTERLEAVED=interleaved,
        ROWS=ROTATE.rows, HEADS=ROTATE.heads, num_warps=ROTATE.num_warps,
    )  # fmt: skip
    return x_out, y_out
