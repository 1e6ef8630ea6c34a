"""Attention within segments of any length, given by `cu_seqlens` alone: nothing about the lengths is known at launch.

A program takes one head and BLOCK_M queries of one segment and walks over the segment's keys with the online softmax.
Which segment and which queries, it finds by bisecting `cu_seqlens`: segment i owns the tiles from number
cu_seqlens[i] // BLOCK_M + i on, which leaves room for its last, partial tile, grows with i, and needs no running sum.

Keys and values come by TMA, in tiles of 64 channels and, at head_dim 72 and 80, 16 more; the hardware fills channels
72 to 79 with zeros. A key tile never reaches outside its segment, where a neighbour's infinities would spoil the
products: the first tile of a segment whose length is no multiple of BLOCK_N overlaps the second, and the overlap is
masked. Only segments shorter than one tile take a path of their own, with masked loads.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qwenvit.kernels.rope import load_angles, load_rotated, rotate, unit

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
def _tile(desc, desc_tail, i_head, i_row, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Rows of keys or values by TMA: [BLOCK_N, 64] and [BLOCK_N, 16] (the first again at head_dim 64)."""
    b_x = tl.reshape(desc.load([i_head, i_row, 0]), [BLOCK_N, 64])
    b_tail = b_x
    if D > 64:
        b_tail = tl.reshape(desc_tail.load([i_head, i_row, 64]), [BLOCK_N, 16])
    return b_x, b_tail


@triton.jit
def scores(b_q, b_q_tail, b_k, b_k_tail, D: tl.constexpr):
    """Products of queries and keys: [rows of queries, rows of keys], not scaled yet."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if D > 64:
        b_s = tl.dot(b_q_tail, tl.trans(b_k_tail), b_s, input_precision="ieee")
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
def _walk(
    queries,
    descs,
    i_head,
    i_first,
    i_past,
    overlap,
    state,
    qk_scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    b_q, b_q_tail = queries
    k_desc, k_tail_desc, v_desc, v_tail_desc = descs
    b_max, b_sum, b_out, b_out_tail = state
    dtype: tl.constexpr = b_q.dtype
    for i_key in tl.range(i_first, i_past, BLOCK_N):
        b_k, b_k_tail = _tile(k_desc, k_tail_desc, i_head, i_key + overlap, BLOCK_N, D)
        b_s = scores(b_q, b_q_tail, b_k, b_k_tail, D)
        if MASKED:
            b_s = tl.where((tl.arange(0, BLOCK_N) < BLOCK_N - overlap)[None, :], b_s, float("-inf"))
        b_p, b_alpha, b_max = softmax_step(b_s, b_max, qk_scale, dtype)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_v, b_v_tail = _tile(v_desc, v_tail_desc, i_head, i_key + overlap, BLOCK_N, D)
        b_out = tl.dot(b_p.to(dtype), b_v, b_out * b_alpha[:, None], input_precision="ieee")
        if D > 64:
            b_out_tail = tl.dot(b_p.to(dtype), b_v_tail, b_out_tail * b_alpha[:, None], input_precision="ieee")
    return b_max, b_sum, b_out, b_out_tail


@triton.jit(do_not_specialize=["n_segments", "S"])
def _long_attention(
    q_ptr,  # shape (S, H, D)
    k_desc,  # rotated keys, shape (H, S, D), in blocks of BLOCK_N rows and 64 channels
    k_tail_desc,  # same, 16 channels
    v_desc,
    v_tail_desc,
    out_ptr,  # shape (S, H, D)
    cos_ptr,  # fp32, shape (S, D/2); None where q is rotated already
    sin_ptr,  # same
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    stride_qs,  # this and the next in UNITs of elements
    stride_qh,
    stride_os,
    n_segments,
    S,
    qk_scale,  # scale * log2(e)
    D: tl.constexpr,
    UNIT: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_head = tl.program_id(1)
    start, end, i_row = _find_tile(cu_seqlens_ptr, n_segments, S, tl.program_id(0), BLOCK_M)
    if i_row < end:
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        o_m = tl.arange(0, BLOCK_M)
        m_m = o_m < end - i_row
        i_first = i_row.to(tl.int64)
        p_q = q_ptr + (i_first * stride_qs + i_head.to(tl.int64) * stride_qh) * UNIT
        o_q = o_m * (stride_qs * UNIT)
        if cos_ptr is None:
            o_channel = tl.arange(0, 64)
            b_q = tl.load(p_q + (o_q[:, None] + o_channel[None, :]), mask=m_m[:, None], other=0.0)
            b_q_tail = b_q
            if D > 64:
                o_channel_tail = 64 + tl.arange(0, 16)
                m_tail = m_m[:, None] & (o_channel_tail < D)[None, :]
                b_q_tail = tl.load(p_q + (o_q[:, None] + o_channel_tail[None, :]), mask=m_tail, other=0.0)
        else:
            p_cos = cos_ptr + i_first * ANGLE_STRIDE
            p_sin = sin_ptr + i_first * ANGLE_STRIDE
            b_cos, b_sin = load_angles(p_cos, p_sin, o_m, m_m, D, ANGLE_STRIDE, 0, 32)
            b_q = load_rotated(p_q, o_q, m_m, b_cos, b_sin, D, INTERLEAVED, 0, 32)
            b_q_tail = b_q
            if D > 64:
                b_cos, b_sin = load_angles(p_cos, p_sin, o_m, m_m, D, ANGLE_STRIDE, 32, 8)
                b_q_tail = load_rotated(p_q, o_q, m_m, b_cos, b_sin, D, INTERLEAVED, 32, 8)
        o_n = tl.arange(0, BLOCK_N)
        length = end - start
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_out = tl.zeros([BLOCK_M, 64], tl.float32)
        b_out_tail = tl.zeros([BLOCK_M, 16], tl.float32)
        if length < BLOCK_N:
            b_k, b_k_tail = _tile(k_desc, k_tail_desc, i_head, start, BLOCK_N, D)
            b_v, b_v_tail = _tile(v_desc, v_tail_desc, i_head, start, BLOCK_N, D)
            m_n = o_n < length
            b_s = scores(b_q, b_q_tail, b_k, b_k_tail, D)
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_p, _, b_max = softmax_step(b_s, b_max, qk_scale, dtype)
            b_sum = tl.sum(b_p, 1)
            b_out = tl.dot(b_p.to(dtype), tl.where(m_n[:, None], b_v, 0.0), input_precision="ieee")
            if D > 64:
                b_v_tail = tl.where(m_n[:, None], b_v_tail, 0.0)
                b_out_tail = tl.dot(b_p.to(dtype), b_v_tail, input_precision="ieee")
        else:
            overlap = (BLOCK_N - length % BLOCK_N) % BLOCK_N
            state = (b_max, b_sum, b_out, b_out_tail)
            queries = (b_q, b_q_tail)
            descs = (k_desc, k_tail_desc, v_desc, v_tail_desc)
            first = start - overlap
            state = _walk(queries, descs, i_head, first, start, overlap, state, qk_scale, D, BLOCK_N, True)
            first += (overlap > 0).to(tl.int32) * BLOCK_N
            state = _walk(queries, descs, i_head, first, end, 0, state, qk_scale, D, BLOCK_N, False)
            b_max, b_sum, b_out, b_out_tail = state
        b_inverse = 1.0 / b_sum
        p_out = out_ptr + (i_first * stride_os + i_head * D)
        o_out = o_m * stride_os
        o_channel = tl.arange(0, 64)
        b_out = (b_out * b_inverse[:, None]).to(dtype)
        tl.store(p_out + (o_out[:, None] + o_channel[None, :]), b_out, mask=m_m[:, None])
        if D > 64:
            o_channel = 64 + tl.arange(0, 16)
            mask = m_m[:, None] & (o_channel < D)[None, :]
            b_out_tail = (b_out_tail * b_inverse[:, None]).to(dtype)
            tl.store(p_out + (o_out[:, None] + o_channel[None, :]), b_out_tail, mask=mask)


@dataclass(frozen=True)
class LongConfig:
    """Queries a program, keys a step, warps, stages of the loads, and most registers a thread."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None
    rotate_first: bool
    """Whether queries, as keys, are rotated by a pass before: that leaves the loop enough registers for 16 warps."""


def long_config(dtype: torch.dtype) -> LongConfig:
    """Launch config; the same for every length, so that a segment's result does not depend on its neighbours."""
    if dtype == torch.float32:
        return LongConfig(block_m=64, block_n=32, num_warps=8, num_stages=2, maxnreg=None, rotate_first=True)
    return LongConfig(block_m=128, block_n=64, num_warps=8, num_stages=3, maxnreg=128, rotate_first=True)


def _descriptors(x: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """`x [S, H, D]` as tiles of `rows` rows and 64, or 16, channels of a head."""
    S, H, D = x.shape
    strides = [x.stride(1), x.stride(0), 1]
    return tuple(TensorDescriptor(x, [H, S, D], strides, [1, rows, channels]) for channels in (64, 16))


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
    config: LongConfig | None = None,
) -> None:
    """Attention within segments of any length."""
    S, H, D = q.shape
    n_segments = len(cu_seqlens) - 1
    config = config or long_config(q.dtype)
    if cos is not None and sin is not None:
        unrotated, k = k, torch.empty_like(k, memory_format=torch.contiguous_format)
        if config.rotate_first:
            q_unrotated, q = q, torch.empty_like(q, memory_format=torch.contiguous_format)
            rotate(unrotated, k, cos, sin, interleaved, q_unrotated, q)
            cos = sin = None
        else:
            rotate(unrotated, k, cos, sin, interleaved)
    k, v = (x if unit(x) > 1 else x.contiguous() for x in (k, v))
    size = unit(q)
    options = {} if config.maxnreg is None or not q.is_cuda else {"maxnreg": config.maxnreg}
    _long_attention[(S // config.block_m + n_segments, H)](
        q, *_descriptors(k, config.block_n), *_descriptors(v, config.block_n), out, cos, sin, cu_seqlens,
        q.stride(0) // size, q.stride(1) // size, out.stride(0), n_segments, S, scale * LOG2_E,
        D=D, UNIT=size, ANGLE_STRIDE=0 if cos is None else cos.stride(0), INTERLEAVED=interleaved,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps,
        num_stages=config.num_stages, **options,
    )  # fmt: skip
