"""Attention within segments of any length, given by `cu_seqlens` alone: nothing about the lengths is known at launch.

A program takes one head and BLOCK_M queries of one segment and walks over the segment's keys with the online softmax.
Which segment and which queries, it finds by bisecting `cu_seqlens`: segment i owns the tiles from number
cu_seqlens[i] // BLOCK_M + i on, which leaves room for its last, partial tile, grows with i, and needs no running sum.

Queries and keys are rotated by a pass before: rotating keys here, once for each tile of queries, took 1.3 to 1.45 times
as long on an H200. The pass also lays them out so that their rows fill sectors (`rope.rotate`). Loads are plain
pointers, 64 channels and 16 more: the same loop with TMA descriptors was no faster, has five barriers a step where this
has two, and builds its descriptors on the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.attention.rotate import rotate_by_head, split_channels, stride_unit, with_small_strides
from qwenvit.kernels.device import capability, tuning

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
def _load_tile(p_x, o_x, m_row, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    o_channel = tl.arange(0, WIDTH)
    p_tile = p_x + (o_x[:, None] + o_channel[None, :])
    m_channel = (o_channel < CHANNELS)[None, :]
    if m_row is None:
        b_x = tl.load(p_tile, mask=m_channel, other=0.0) if CHANNELS < WIDTH else tl.load(p_tile)
    elif CHANNELS < WIDTH:
        b_x = tl.load(p_tile, mask=m_row[:, None] & m_channel, other=0.0)
    else:
        b_x = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    return b_x


@triton.jit
def load_tiles(p_x, p_rest, o_x, o_rest, m_row, REST: tl.constexpr):
    """Rows of queries, keys or values: [rows, 64], and [rows, 16] of the REST channels beyond (else the first again).

    `m_row` is None where all rows are there.
    """
    b_x = _load_tile(p_x, o_x, m_row, 64, 64)
    b_rest = b_x
    if REST > 0:
        b_rest = _load_tile(p_rest, o_rest, m_row, REST, 16)
    return b_x, b_rest


@triton.jit
def store_tiles(p_x, o_x, m_row, b_x, b_rest, D: tl.constexpr):
    """Rows of output, rounded to the pointer's dtype."""
    o_channel = tl.arange(0, 64)
    b_x = b_x.to(p_x.dtype.element_ty)
    tl.store(p_x + (o_x[:, None] + o_channel[None, :]), b_x, mask=m_row[:, None])
    if D > 64:
        o_channel = 64 + tl.arange(0, 16)
        b_rest = b_rest.to(p_x.dtype.element_ty)
        tl.store(p_x + (o_x[:, None] + o_channel[None, :]), b_rest, mask=m_row[:, None] & (o_channel < D)[None, :])


@triton.jit
def _short_sums(b_a, b_b):
    """b_a [M, K] times b_b [N, K] transposed, in fp32, as sums of 16 products that are added in pairs.

    One sum of all rounds K times at the size of its largest product: with channels ten times larger than the rest it
    was further from the truth than torch's, which adds eight products at a time.
    """
    if b_a.shape[1] > 16:
        b_a, b_a_odd = tl.split(tl.reshape(b_a, [b_a.shape[0], b_a.shape[1] // 2, 2]))
        b_b, b_b_odd = tl.split(tl.reshape(b_b, [b_b.shape[0], b_b.shape[1] // 2, 2]))
        # A plain addition would become the accumulator of the product, and the sum a long one again.
        b_c = tl.fma(_short_sums(b_a, b_b), 1.0, _short_sums(b_a_odd, b_b_odd))
    else:
        b_c = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
    return b_c


@triton.jit
def product(b_a, b_b, b_c):
    """b_a [M, K] times b_b [N, K] transposed, in fp32, plus b_c if there is one."""
    if b_a.dtype == tl.float32:
        b_d = _short_sums(b_a, b_b)
        if b_c is not None:
            b_d = tl.fma(b_c, 1.0, b_d)
    else:
        b_d = tl.dot(b_a, tl.trans(b_b), b_c)
    return b_d


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
def scores(queries, keys, D: tl.constexpr):
    """Products of queries and keys: [rows of queries, rows of keys], not scaled yet."""
    b_s = product(queries[0], keys[0], None)
    if D > 64:
        b_s = product(queries[1], keys[1], b_s)
    return b_s


@triton.jit
def attend(queries, keys, values, m_key, state, qk_scale, D: tl.constexpr):
    """One step of the online softmax; `state` is (maximum, sum, output of 64 channels, output of the rest)."""
    b_max, b_sum, b_out, b_out_rest = state
    b_v, b_v_rest = values
    b_s = scores(queries, keys, D)
    if m_key is not None:
        b_s = tl.where(m_key[None, :], b_s, float("-inf"))
    b_p, b_alpha, b_max = softmax_step(b_s, b_max, qk_scale, b_v.dtype)
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_p = b_p.to(b_v.dtype)
    b_out = product(b_p, tl.trans(b_v), b_out * b_alpha[:, None])
    if D > 64:
        b_out_rest = product(b_p, tl.trans(b_v_rest), b_out_rest * b_alpha[:, None])
    return b_max, b_sum, b_out, b_out_rest


@triton.jit
def empty_state(BLOCK_M: tl.constexpr):
    """`attend`'s state before the first step."""
    return (
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, 64], tl.float32),
        tl.zeros([BLOCK_M, 16], tl.float32),
    )


@triton.jit(do_not_specialize=["n_segments", "S"])
def _varlen_attention(
    q_ptr,  # shape (S, H, 64), rotated
    q_rest_ptr,  # shape (S, H, QK_REST), rotated
    k_ptr,  # shape (S, H, 64), rotated
    k_rest_ptr,  # shape (S, H, QK_REST), rotated
    v_ptr,  # shape (S, H, 64)
    v_rest_ptr,  # shape (S, H, V_REST)
    out_ptr,  # shape (S, H, D), contiguous
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    stride_qs,  # this and the next eleven in UNITs of elements
    stride_qh,
    stride_q_rest_s,
    stride_q_rest_h,
    stride_ks,
    stride_kh,
    stride_k_rest_s,
    stride_k_rest_h,
    stride_vs,
    stride_vh,
    stride_v_rest_s,
    stride_v_rest_h,
    stride_os,
    n_segments,
    S,
    qk_scale,  # scale * log2(e)
    D: tl.constexpr,
    UNIT: tl.constexpr,
    QK_REST: tl.constexpr,
    V_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_head = tl.program_id(1).to(tl.int64)
    start, end, i_row = _find_tile(cu_seqlens_ptr, n_segments, S, tl.program_id(0), BLOCK_M)
    if i_row < end:
        o_m = tl.arange(0, BLOCK_M)
        m_m = o_m < end - i_row
        i_first = i_row.to(tl.int64)
        p_q = q_ptr + (i_first * stride_qs + i_head * stride_qh) * UNIT
        p_q_rest = q_rest_ptr + (i_first * stride_q_rest_s + i_head * stride_q_rest_h) * UNIT
        queries = load_tiles(p_q, p_q_rest, o_m * (stride_qs * UNIT), o_m * (stride_q_rest_s * UNIT), m_m, QK_REST)
        p_out = out_ptr + (i_first * stride_os + i_head * D)
        i_first = start.to(tl.int64)
        p_k = k_ptr + (i_first * stride_ks + i_head * stride_kh) * UNIT
        p_k_rest = k_rest_ptr + (i_first * stride_k_rest_s + i_head * stride_k_rest_h) * UNIT
        p_v = v_ptr + (i_first * stride_vs + i_head * stride_vh) * UNIT
        p_v_rest = v_rest_ptr + (i_first * stride_v_rest_s + i_head * stride_v_rest_h) * UNIT
        o_n = tl.arange(0, BLOCK_N)
        o_k = o_n * (stride_ks * UNIT)
        o_k_rest = o_n * (stride_k_rest_s * UNIT)
        o_v = o_n * (stride_vs * UNIT)
        o_v_rest = o_n * (stride_v_rest_s * UNIT)
        state = empty_state(BLOCK_M)
        n_full = (end - start) // BLOCK_N
        for _ in tl.range(0, n_full, num_stages=STAGES):
            keys = load_tiles(p_k, p_k_rest, o_k, o_k_rest, None, QK_REST)
            values = load_tiles(p_v, p_v_rest, o_v, o_v_rest, None, V_REST)
            state = attend(queries, keys, values, None, state, qk_scale, D)
            p_k += BLOCK_N * stride_ks * UNIT
            p_k_rest += BLOCK_N * stride_k_rest_s * UNIT
            p_v += BLOCK_N * stride_vs * UNIT
            p_v_rest += BLOCK_N * stride_v_rest_s * UNIT
        left = end - start - n_full * BLOCK_N
        if left > 0:  # masked loads: a neighbour's infinities never come in
            m_n = o_n < left
            keys = load_tiles(p_k, p_k_rest, o_k, o_k_rest, m_n, QK_REST)
            values = load_tiles(p_v, p_v_rest, o_v, o_v_rest, m_n, V_REST)
            state = attend(queries, keys, values, m_n, state, qk_scale, D)
        _, b_sum, b_out, b_out_rest = state
        b_inverse = (1.0 / b_sum)[:, None]
        store_tiles(p_out, o_m * stride_os, m_m, b_out * b_inverse, b_out_rest * b_inverse, D)


@dataclass(frozen=True)
class VarlenConfig:
    """Queries a program, keys a step, warps, stages of the loads, and most registers a thread."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


def varlen_config(dtype: torch.dtype, major: int, head_dim: int, n_tokens: int, n_heads: int) -> VarlenConfig:
    """Launch config. `block_n` orders the sums, so it knows nothing of the neighbours a segment may have.

    Times are of attention alone, 16 heads in bf16 on an H200.
    """
    if dtype == torch.float32:  # no tensor cores in IEEE fp32: a small tile, whose operands lie in registers
        return VarlenConfig(block_m=32, block_n=32, num_warps=8, num_stages=2, maxnreg=None)
    n_tiles = triton.cdiv(n_tokens, 64) * n_heads
    tuned = tuning(major)
    if major != 9 or n_tiles <= 2 * tuned.multiprocessors:
        # As many stages as let a multiprocessor hold two programs: it would take a third from another that has one
        # (1024 tokens, head_dim 72 and 80: 17.3 µs, with three programs 21.4).
        return VarlenConfig(block_m=64, block_n=64, num_warps=4, num_stages=5 if head_dim == 64 else 4, maxnreg=None)
    if head_dim == 64 or (head_dim == 80 and n_tiles >= tuned.many_query_tiles):
        # Two programs of 128 queries: 9216 tokens of head_dim 64 and 80 took 785 and 952 µs, with three programs of 64
        # queries 828 and 1005; 2304 tokens of 80, 91 and 78.
        return VarlenConfig(block_m=128, block_n=64, num_warps=8, num_stages=4 if head_dim == 64 else 3, maxnreg=128)
    return VarlenConfig(block_m=64, block_n=64, num_warps=4, num_stages=3, maxnreg=168)


def varlen_attention(
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
        q, k, v = rotate_by_head(q, k, v, cos, sin, interleaved)
    else:
        q, k, v = (split_channels(with_small_strides(x)) for x in (q, k, v))
    major = capability(out.device)[0] if out.is_cuda else 0
    config = varlen_config(out.dtype, major, D, S, H)
    views = (*q, *k, *v)
    size = stride_unit(*views)
    options = {} if config.maxnreg is None else {"maxnreg": config.maxnreg}
    _varlen_attention[(S // config.block_m + n_segments, H)](
        *views, out, cu_seqlens, *(x.stride(i) // size for x in views for i in (0, 1)), out.stride(0),
        n_segments, S, scale * LOG2_E,
        D=D, UNIT=size, QK_REST=q[1].shape[2], V_REST=v[1].shape[2],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages, num_warps=config.num_warps, **options,
    )  # fmt: skip
