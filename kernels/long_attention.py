"""Attention within segments of any length, given by `cu_seqlens` alone: nothing about the lengths is known at launch.

A program takes one head and BLOCK_M queries of one segment and walks over the segment's keys with the online softmax.
Which segment and which queries, it finds by bisecting `cu_seqlens`: segment i owns the tiles from number
cu_seqlens[i] // BLOCK_M + i on, which leaves room for its last, partial tile, grows with i, and needs no running sum.

Queries and keys are rotated by a pass before: rotating keys here, once for each tile of queries, took 1.3 to 1.45 times
as long on an H200. Loads are plain pointers, 64 channels and 16 more: the same loop with TMA descriptors was no faster,
has five barriers a step where this has two, and builds its descriptors on the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.rope import rotate, unit, within_reach

LOG2_E = 1.4426950408889634


@triton.jit
def _find_tile(cu_seqlens_ptr, n_segments, S, i_tile, BLOCK_M: tl.constexpr):
    """Start and end of the segment that owns tile `i_tile`, and the tile's first row (past the end: nothing to do)."""
    i_segment = 0
    i_past = n_segments
    while i_past - i_segment > 1:
        i_middle = (i_segment + i_past) // 2
        right = tl.load(cu_seqlens_ptr + i_middle) // BLOCK_M + i_middle <= i_tile
        i_segment = tl.where(right, i_middle, i_segment)
        i_past = tl.where(right, i_past, i_middle)
    start = tl.load(cu_seqlens_ptr + i_segment)
    end = tl.minimum(tl.load(cu_seqlens_ptr + i_segment + 1), S)
    return start, end, start + (i_tile - start // BLOCK_M - i_segment) * BLOCK_M


@triton.jit
def load_tile(p_x, o_x, m_row, D: tl.constexpr):
    """Rows of queries, keys or values: [rows, 64], and [rows, 16] of the channels beyond (else the first again).

    `m_row` is None where all rows are there.
    """
    o_channel = tl.arange(0, 64)
    o_tail = 64 + tl.arange(0, 16)
    p_main = p_x + (o_x[:, None] + o_channel[None, :])
    p_tail = p_x + (o_x[:, None] + o_tail[None, :])
    if m_row is None:
        b_x = tl.load(p_main)
        b_tail = b_x
        if D > 72:
            b_tail = tl.load(p_tail)
        elif D > 64:
            b_tail = tl.load(p_tail, mask=(o_tail < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p_main, mask=m_row[:, None], other=0.0)
        b_tail = b_x
        if D > 64:
            b_tail = tl.load(p_tail, mask=m_row[:, None] & (o_tail < D)[None, :], other=0.0)
    return b_x, b_tail


@triton.jit
def store_tile(p_x, o_x, m_row, b_x, b_tail, D: tl.constexpr):
    """The inverse of `load_tile`, rounded to the pointer's dtype."""
    o_channel = tl.arange(0, 64)
    b_x = b_x.to(p_x.dtype.element_ty)
    tl.store(p_x + (o_x[:, None] + o_channel[None, :]), b_x, mask=m_row[:, None])
    if D > 64:
        o_tail = 64 + tl.arange(0, 16)
        b_tail = b_tail.to(p_x.dtype.element_ty)
        tl.store(p_x + (o_x[:, None] + o_tail[None, :]), b_tail, mask=m_row[:, None] & (o_tail < D)[None, :])


@triton.jit
def add_product(b_factor, b_sum, b_a, b_b):
    """b_factor * b_sum + b_a @ b_b. In fp32 the product is summed by itself: short sums, small errors."""
    if b_a.dtype == tl.float32:  # no plain addition: Triton would make b_sum the product's accumulator again
        b_sum = tl.fma(b_sum, b_factor, tl.dot(b_a, b_b, input_precision="ieee"))
    else:
        b_sum = tl.dot(b_a, b_b, b_sum * b_factor)
    return b_sum


@triton.jit
def scores(b_q, b_q_tail, b_k, b_k_tail, D: tl.constexpr):
    """Products of queries and keys: [rows of queries, rows of keys], not scaled yet."""
    if b_q.dtype == tl.float32:  # three short chains: a long one rounds at the size of its largest channel
        b_q, b_q_odd = tl.split(tl.reshape(b_q, [b_q.shape[0], 32, 2]))
        b_k, b_k_odd = tl.split(tl.reshape(b_k, [b_k.shape[0], 32, 2]))
        b_s = add_product(1.0, tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), b_q_odd, tl.trans(b_k_odd))
        if D > 64:
            b_s = add_product(1.0, b_s, b_q_tail, tl.trans(b_k_tail))
    else:
        b_s = tl.dot(b_q, tl.trans(b_k))
        if D > 64:
            b_s = tl.dot(b_q_tail, tl.trans(b_k_tail), b_s)
    return b_s


@triton.jit
def softmax_step(b_s, b_max, qk_scale, dtype: tl.constexpr):
    """Exponentials relative to the new maximum, the factor for sums relative to the old one, and the new maximum."""
    if dtype == tl.float32:  # the difference first: exact for the scores that matter
        b_top = tl.maximum(b_max, tl.max(b_s, 1))
        b_alpha = tl.exp2((b_max - b_top) * qk_scale)
        b_p = tl.exp2((b_s - b_top[:, None]) * qk_scale)
    else:  # one fused instruction an element; the maximum is carried scaled, so that its rounding cancels
        b_top = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)
        b_alpha = tl.exp2(b_max - b_top)
        b_p = tl.exp2(b_s * qk_scale - b_top[:, None])
    return b_p, b_alpha, b_top


@triton.jit
def attend(queries, keys, values, m_key, state, qk_scale, dtype: tl.constexpr, D: tl.constexpr):
    """One step of the online softmax; `state` is (maximum, sum, output of 64 channels, output of the rest)."""
    b_max, b_sum, b_out, b_out_tail = state
    b_v, b_v_tail = values
    b_s = scores(queries[0], queries[1], keys[0], keys[1], D)
    if m_key is not None:
        b_s = tl.where(m_key[None, :], b_s, float("-inf"))
    b_p, b_alpha, b_max = softmax_step(b_s, b_max, qk_scale, dtype)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_out = add_product(b_alpha[:, None], b_out, b_p.to(dtype), b_v)
    if D > 64:
        b_out_tail = add_product(b_alpha[:, None], b_out_tail, b_p.to(dtype), b_v_tail)
    return b_max, b_sum, b_out, b_out_tail


@triton.jit(do_not_specialize=["n_segments", "S"])
def _long_attention(
    q_ptr,  # shape (S, H, D), rotated
    k_ptr,  # shape (S, H, D), rotated
    v_ptr,  # shape (S, H, D)
    out_ptr,  # shape (S, H, D), contiguous
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    stride_qs,  # this and the next five in UNITs of elements
    stride_qh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    stride_os,
    n_segments,
    S,
    qk_scale,  # scale * log2(e)
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_head = tl.program_id(1).to(tl.int64)
    start, end, i_row = _find_tile(cu_seqlens_ptr, n_segments, S, tl.program_id(0), BLOCK_M)
    if i_row < end:
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        o_m = tl.arange(0, BLOCK_M)
        m_m = o_m < end - i_row
        i_first = i_row.to(tl.int64)
        p_q = q_ptr + (i_first * stride_qs + i_head * stride_qh) * UNIT
        queries = load_tile(p_q, o_m * (stride_qs * UNIT), m_m, D)
        o_n = tl.arange(0, BLOCK_N)
        o_k = o_n * (stride_ks * UNIT)
        o_v = o_n * (stride_vs * UNIT)
        p_k = k_ptr + (start.to(tl.int64) * stride_ks + i_head * stride_kh) * UNIT
        p_v = v_ptr + (start.to(tl.int64) * stride_vs + i_head * stride_vh) * UNIT
        state = (
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, 64], tl.float32),
            tl.zeros([BLOCK_M, 16], tl.float32),
        )
        n_full = (end - start) // BLOCK_N
        for _ in tl.range(0, n_full, num_stages=STAGES):
            keys = load_tile(p_k, o_k, None, D)
            values = load_tile(p_v, o_v, None, D)
            state = attend(queries, keys, values, None, state, qk_scale, dtype, D)
            p_k += BLOCK_N * stride_ks * UNIT
            p_v += BLOCK_N * stride_vs * UNIT
        rest = end - start - n_full * BLOCK_N
        if rest > 0:  # masked loads: a neighbour's infinities never come in
            m_n = o_n < rest
            keys = load_tile(p_k, o_k, m_n, D)
            values = load_tile(p_v, o_v, m_n, D)
            state = attend(queries, keys, values, m_n, state, qk_scale, dtype, D)
        _, b_sum, b_out, b_out_tail = state
        b_inverse = (1.0 / b_sum)[:, None]
        p_out = out_ptr + (i_first * stride_os + i_head * D)
        store_tile(p_out, o_m * stride_os, m_m, b_out * b_inverse, b_out_tail * b_inverse, D)


@dataclass(frozen=True)
class LongConfig:
    """Queries a program, keys a step, warps, and stages of the loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


SMALL = 264
"""Tiles of 64 queries that are few: two for each of an H200's 132 multiprocessors. With 256 of them (S = 1024, head_dim
80) programs of 64 queries took 19.3 µs and of 128 queries 28.9; with 1024 of them (S = 4096) 251 and 204."""


def long_config(dtype: torch.dtype, n_tokens: int, n_heads: int) -> LongConfig:
    """Launch config. `block_n` orders the sums, so it knows nothing of the neighbours a segment may have.

    At head_dim 64 steps of 128 keys were faster up to 1024 tokens (13.8 µs against 19.3), and slower beyond.
    """
    if dtype == torch.float32:  # no tensor cores in IEEE fp32: a small tile, whose operands lie in registers
        return LongConfig(block_m=32, block_n=32, num_warps=8, num_stages=2)
    if triton.cdiv(n_tokens, 64) * n_heads <= SMALL:
        return LongConfig(block_m=64, block_n=64, num_warps=4, num_stages=4)
    return LongConfig(block_m=128, block_n=64, num_warps=8, num_stages=3)


def long_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    interleaved: bool,
    out: Tensor,
) -> None:
    """Attention within segments of any length, into `out`."""
    S, H, D = q.shape
    n_segments = len(cu_seqlens) - 1
    if cos is not None and sin is not None:
        q, k = rotate(q, k, cos, sin, interleaved)
    q, k, v = within_reach(q), within_reach(k), within_reach(v)
    config = long_config(q.dtype, S, H)
    size = unit(q, k, v)
    strides = [stride // size for x in (q, k, v) for stride in x.stride()[:2]]
    _long_attention[(S // config.block_m + n_segments, H)](
        q, k, v, out, cu_seqlens, *strides, out.stride(0), n_segments, S, scale * LOG2_E,
        D=D, UNIT=size, BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
