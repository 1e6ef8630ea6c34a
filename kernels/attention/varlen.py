"""Attention within segments of any length, on any GPU. The lengths are known only on the device, from `cu_seqlens`.

A program takes one head and BLOCK_M queries of one segment and walks over the segment's keys with the online softmax.
It finds its segment by bisecting `cu_seqlens`: segment i owns the tiles from number cu_seqlens[i] // BLOCK_M + i on.
These numbers grow with i, include the segment's last, partial tile, and need no running sum.

A separate pass rotates queries and keys before (`rotate_by_head`), because rotating keys here would repeat the work for
each tile of queries. Loads use plain pointers, 64 channels and 16 more; TMA descriptors were no faster (TUNING.md).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.attention.rotate import rotate_by_head, split_channels, stride_unit, with_small_strides
from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.device import capability, tuning

LOG2_E = 1.4426950408889634


@triton.jit
def _find_tile(cu_seqlens_ptr, n_segments, S, i_tile, BLOCK_M: tl.constexpr):
    """Return start and end of the segment that owns tile `i_tile`, and the tile's first row.

    The first row is at or past the end if the tile does not exist.
    """
    i_segment = 0
    i_end = n_segments
    while i_end - i_segment > 1:
        i_middle = (i_segment + i_end) // 2
        not_after = tl.load(cu_seqlens_ptr + i_middle) // BLOCK_M + i_middle <= i_tile
        i_segment = tl.where(not_after, i_middle, i_segment)
        i_end = tl.where(not_after, i_end, i_middle)
    start = tl.load(cu_seqlens_ptr + i_segment)
    end = tl.minimum(tl.load(cu_seqlens_ptr + i_segment + 1), S)
    return start, end, start + (i_tile - start // BLOCK_M - i_segment) * BLOCK_M


@triton.jit
def _load_tile(p_x, o_x, m_row, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Load [rows, WIDTH], zeros past CHANNELS; `m_row` is None if every row exists."""
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
    """Load rows of queries, keys or values: [rows, 64], and [rows, 16] of the REST channels beyond 64.

    Without such channels the second result repeats the first. `m_row` is None if every row exists.
    """
    b_x = _load_tile(p_x, o_x, m_row, 64, 64)
    b_rest = b_x
    if REST > 0:
        b_rest = _load_tile(p_rest, o_rest, m_row, REST, 16)
    return b_x, b_rest


@triton.jit
def store_tiles(p_x, o_x, m_row, b_x, b_rest, D: tl.constexpr):
    """Store rows of the output, [rows, 64] and [rows, 16] of the channels beyond 64, in the pointer's dtype."""
    o_channel = tl.arange(0, 64)
    b_x = b_x.to(p_x.dtype.element_ty)
    tl.store(p_x + (o_x[:, None] + o_channel[None, :]), b_x, mask=m_row[:, None])
    if D > 64:
        o_channel = 64 + tl.arange(0, 16)
        b_rest = b_rest.to(p_x.dtype.element_ty)
        tl.store(p_x + (o_x[:, None] + o_channel[None, :]), b_rest, mask=m_row[:, None] & (o_channel < D)[None, :])


@triton.jit
def _pairwise_dot(b_a, b_b):
    """Return b_a [M, K] times b_b [N, K] transposed in fp32, by pairwise summation of sums of 16 products.

    A single sum rounds K times at the unit of its largest product. With channels ten times larger than the others its
    error exceeds that of torch, which adds eight products at a time.
    """
    if b_a.shape[1] > 16:
        b_a, b_a_odd = tl.split(tl.reshape(b_a, [b_a.shape[0], b_a.shape[1] // 2, 2]))
        b_b, b_b_odd = tl.split(tl.reshape(b_b, [b_b.shape[0], b_b.shape[1] // 2, 2]))
        # The compiler would fold a plain addition into the product's accumulator, which makes one long sum again.
        b_c = tl.fma(_pairwise_dot(b_a, b_b), 1.0, _pairwise_dot(b_a_odd, b_b_odd))
    else:
        b_c = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
    return b_c


@triton.jit
def product(b_a, b_b, b_c):
    """Return b_a [M, K] times b_b [N, K] transposed in fp32, plus b_c unless it is None."""
    if b_a.dtype == tl.float32:
        b_d = _pairwise_dot(b_a, b_b)
        if b_c is not None:
            b_d = tl.fma(b_c, 1.0, b_d)
    else:
        b_d = tl.dot(b_a, tl.trans(b_b), b_c)
    return b_d


@triton.jit
def softmax_step(b_s, b_max, qk_scale, dtype: tl.constexpr):
    """Return exp2 of the scores minus the new maximum, the factor that rescales older sums, and the new maximum."""
    if dtype == tl.float32:  # subtract before scaling: exact for scores near the maximum
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_alpha = tl.exp2((b_max - b_new_max) * qk_scale)
        b_p = tl.exp2((b_s - b_new_max[:, None]) * qk_scale)
    else:  # one fused multiply-add per element; the maximum is kept scaled, so that its rounding cancels
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)
        b_alpha = tl.exp2(b_max - b_new_max)
        b_p = tl.exp2(b_s * qk_scale - b_new_max[:, None])
    return b_p, b_alpha, b_new_max


@triton.jit
def scores(queries, keys, D: tl.constexpr):
    """Return the products of queries and keys, [queries, keys], not scaled."""
    b_s = product(queries[0], keys[0], None)
    if D > 64:
        b_s = product(queries[1], keys[1], b_s)
    return b_s


@triton.jit
def attend(queries, keys, values, m_key, state, qk_scale, D: tl.constexpr):
    """Return the state after one step of the online softmax.

    `state` is (maximum [M], sum [M], output [M, 64], output [M, 16] of the channels beyond 64).
    """
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
def initial_state(BLOCK_M: tl.constexpr):
    """Return `attend`'s state before the first step."""
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
    stride_qs,  # this and the next eleven in units of STRIDE_UNIT elements
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
    STRIDE_UNIT: tl.constexpr,
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
        p_q = q_ptr + (i_first * stride_qs + i_head * stride_qh) * STRIDE_UNIT
        p_q_rest = q_rest_ptr + (i_first * stride_q_rest_s + i_head * stride_q_rest_h) * STRIDE_UNIT
        queries = load_tiles(
            p_q, p_q_rest, o_m * (stride_qs * STRIDE_UNIT), o_m * (stride_q_rest_s * STRIDE_UNIT), m_m, QK_REST
        )
        p_out = out_ptr + (i_first * stride_os + i_head * D)
        i_first = start.to(tl.int64)
        p_k = k_ptr + (i_first * stride_ks + i_head * stride_kh) * STRIDE_UNIT
        p_k_rest = k_rest_ptr + (i_first * stride_k_rest_s + i_head * stride_k_rest_h) * STRIDE_UNIT
        p_v = v_ptr + (i_first * stride_vs + i_head * stride_vh) * STRIDE_UNIT
        p_v_rest = v_rest_ptr + (i_first * stride_v_rest_s + i_head * stride_v_rest_h) * STRIDE_UNIT
        o_n = tl.arange(0, BLOCK_N)
        o_k = o_n * (stride_ks * STRIDE_UNIT)
        o_k_rest = o_n * (stride_k_rest_s * STRIDE_UNIT)
        o_v = o_n * (stride_vs * STRIDE_UNIT)
        o_v_rest = o_n * (stride_v_rest_s * STRIDE_UNIT)
        state = initial_state(BLOCK_M)
        n_full_steps = (end - start) // BLOCK_N
        for _ in tl.range(0, n_full_steps, num_stages=STAGES):
            keys = load_tiles(p_k, p_k_rest, o_k, o_k_rest, None, QK_REST)
            values = load_tiles(p_v, p_v_rest, o_v, o_v_rest, None, V_REST)
            state = attend(queries, keys, values, None, state, qk_scale, D)
            p_k += BLOCK_N * stride_ks * STRIDE_UNIT
            p_k_rest += BLOCK_N * stride_k_rest_s * STRIDE_UNIT
            p_v += BLOCK_N * stride_vs * STRIDE_UNIT
            p_v_rest += BLOCK_N * stride_v_rest_s * STRIDE_UNIT
        n_last_keys = end - start - n_full_steps * BLOCK_N
        if n_last_keys > 0:  # masked loads: a neighbour's infinity must not enter the sums
            m_n = o_n < n_last_keys
            keys = load_tiles(p_k, p_k_rest, o_k, o_k_rest, m_n, QK_REST)
            values = load_tiles(p_v, p_v_rest, o_v, o_v_rest, m_n, V_REST)
            state = attend(queries, keys, values, m_n, state, qk_scale, D)
        _, b_sum, b_out, b_out_rest = state
        b_inverse = (1.0 / b_sum)[:, None]
        store_tiles(p_out, o_m * stride_os, m_m, b_out * b_inverse, b_out_rest * b_inverse, D)


@dataclass(frozen=True)
class VarlenConfig:
    """Queries per program, keys per step, warps, load stages, and the limit of registers per thread."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


def varlen_config(dtype: torch.dtype, major: int, head_dim: int, n_tokens: int, n_heads: int) -> VarlenConfig:
    """Return the launch config (TUNING.md).

    `block_n` sets the order of the sums, so it depends on dtype alone: a segment's bits must not depend on the others.
    """
    if dtype == torch.float32:  # IEEE fp32 has no tensor cores: a small tile, whose operands fit in registers
        return VarlenConfig(block_m=32, block_n=32, num_warps=8, num_stages=2, maxnreg=None)
    n_tiles = triton.cdiv(n_tokens, 64) * n_heads
    tuned = tuning(major)
    if major != 9 or n_tiles <= 2 * tuned.multiprocessors:
        # Stages that limit a multiprocessor to two programs: a third would leave another multiprocessor with one.
        return VarlenConfig(block_m=64, block_n=64, num_warps=4, num_stages=5 if head_dim == 64 else 4, maxnreg=None)
    if head_dim == 64 or (head_dim == 80 and n_tiles >= tuned.many_query_tiles):
        # Two programs of 128 queries per multiprocessor beat three of 64 at these sizes.
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
    """Write attention within segments of any length into `out [S, H, D]`.

    Queries, keys and values are `[S, H, D]`; `cos` and `sin` as `rotate_by_head` takes them, or None if q and k are
    already rotated. I/O: reads Q, K and V, and writes `out`; K and V of a segment are read once per tile of queries,
    from L2 if they fit. With `cos` and `sin`, plus `rotate_by_head`. A segment of L tokens takes 4 L² H D FLOPs.
    """
    S, H, D = q.shape
    n_segments = len(cu_seqlens) - 1
    if cos is not None and sin is not None:
        q, k, v = rotate_by_head(q, k, v, cos, sin, interleaved)
    else:
        q, k, v = (split_channels(with_small_strides(x)) for x in (q, k, v))
    major = capability(out.device)[0] if out.is_cuda else 0
    config = varlen_config(out.dtype, major, D, S, H)
    views = (*q, *k, *v)
    unit = stride_unit(*views)
    options = COMPILE_OPTIONS if config.maxnreg is None else COMPILE_OPTIONS | {"maxnreg": config.maxnreg}
    _varlen_attention[(S // config.block_m + n_segments, H)](
        *views, out, cu_seqlens, *(x.stride(i) // unit for x in views for i in (0, 1)), out.stride(0),
        n_segments, S, scale * LOG2_E,
        D=D, STRIDE_UNIT=unit, QK_REST=q[1].shape[2], V_REST=v[1].shape[2],
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, STAGES=config.num_stages, num_warps=config.num_warps, **options,
    )  # fmt: skip
