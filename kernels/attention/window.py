"""RoPE and attention within windows of up to 64 tokens, in one pass; `varlen.py` has longer segments.

Such a window fits one tile. A program takes one window and a few heads and keeps the window's angles in registers. For
each head it loads Q, K and V once, rotates Q and K in fp32, and writes the output. No intermediate goes to memory.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.attention.rotate import load_angles, load_rotated, stride_unit, with_small_strides
from qwenvit.kernels.attention.varlen import (
    LOG2_E,
    attend,
    initial_state,
    load_tiles,
    product,
    scores,
    softmax_step,
    store_tiles,
)
from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.device import capability, tuning

MAX_WINDOW = 64
"""Largest window, in tokens: the rows of a tile."""


@triton.jit
def _load_and_rotate(p_x, o_x, m_row, angles, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load a tile of queries or keys and rotate it unless `angles` is None.

    Return [rows, 64], and [rows, 16] of the channels beyond 64.
    """
    if angles is None:
        b_x, b_x_rest = load_tiles(p_x, p_x + 64, o_x, o_x, m_row, D - 64)
    else:
        b_cos, b_sin, b_cos_rest, b_sin_rest = angles
        b_x = load_rotated(p_x, o_x, m_row, b_cos, b_sin, D, INTERLEAVED, 0, 32)
        b_x_rest = b_x
        if D > 64:
            b_x_rest = load_rotated(p_x, o_x, m_row, b_cos_rest, b_sin_rest, D, INTERLEAVED, 32, 8)
    return b_x, b_x_rest


@triton.jit
def _load_all_angles(cos_ptr, sin_ptr, i_first_row, o_row, m_row, D: tl.constexpr, ANGLE_STRIDE: tl.constexpr):
    """Return (cos, sin) [rows, 32] of pairs 0 to 31 and (cos, sin) [rows, 8] of the others, as one tuple of four.

    Return None if `cos_ptr` is None. With head_dim 64 the last two repeat the first two.
    """
    angles = None
    if cos_ptr is not None:
        p_cos = cos_ptr + i_first_row * ANGLE_STRIDE
        p_sin = sin_ptr + i_first_row * ANGLE_STRIDE
        b_cos, b_sin = load_angles(p_cos, p_sin, o_row, m_row, D, ANGLE_STRIDE, 0, 32)
        angles = (b_cos, b_sin, b_cos, b_sin)
        if D > 64:
            b_cos_rest, b_sin_rest = load_angles(p_cos, p_sin, o_row, m_row, D, ANGLE_STRIDE, 32, 8)
            angles = (b_cos, b_sin, b_cos_rest, b_sin_rest)
    return angles


@triton.jit(do_not_specialize=["n_groups", "S"])
def _window_attention(
    q_ptr,  # shape (S, H, D)
    k_ptr,  # shape (S, H, D)
    v_ptr,  # shape (S, H, D)
    out_ptr,  # shape (S, H, D), contiguous
    cos_ptr,  # shape (S, D / 2 or D); None if q and k are already rotated
    sin_ptr,  # shape (S, D / 2 or D); None if q and k are already rotated
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    stride_qs,  # this and the next five in units of STRIDE_UNIT elements
    stride_qh,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    stride_os,
    n_groups,
    S,
    qk_scale,  # scale * log2(e)
    D: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    SAME_STRIDES: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_segment = tl.program_id(0) // n_groups
    i_head = (tl.program_id(0) % n_groups * HEADS).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + i_segment)
    length = tl.minimum(tl.load(cu_seqlens_ptr + i_segment + 1), S) - start
    i_first_row = start.to(tl.int64)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    o_row = tl.arange(0, BLOCK)
    stride_qs *= STRIDE_UNIT
    stride_qh *= STRIDE_UNIT
    if SAME_STRIDES:
        stride_ks = stride_qs
        stride_vs = stride_qs
        stride_kh = stride_qh
        stride_vh = stride_qh
    else:
        stride_ks *= STRIDE_UNIT
        stride_vs *= STRIDE_UNIT
        stride_kh *= STRIDE_UNIT
        stride_vh *= STRIDE_UNIT
    if length <= 0:  # spare capacity of a CUDA graph
        pass
    elif length <= BLOCK:
        p_q = q_ptr + i_first_row * stride_qs + i_head * stride_qh
        p_k = k_ptr + i_first_row * stride_ks + i_head * stride_kh
        p_v = v_ptr + i_first_row * stride_vs + i_head * stride_vh
        p_out = out_ptr + i_first_row * stride_os + i_head * D
        m_row = o_row < length
        angles = _load_all_angles(cos_ptr, sin_ptr, i_first_row, o_row, m_row, D, ANGLE_STRIDE)
        for _ in tl.range(0, HEADS, num_stages=STAGES):
            queries = _load_and_rotate(p_q, o_row * stride_qs, m_row, angles, D, INTERLEAVED)
            keys = _load_and_rotate(p_k, o_row * stride_ks, m_row, angles, D, INTERLEAVED)
            b_v, b_v_rest = load_tiles(p_v, p_v + 64, o_row * stride_vs, o_row * stride_vs, m_row, D - 64)
            b_s = tl.where(m_row[None, :], scores(queries, keys, D), float("-inf"))
            b_p = softmax_step(b_s, tl.full([BLOCK], float("-inf"), tl.float32), qk_scale, dtype)[0]
            b_inverse = (1.0 / tl.sum(b_p, 1))[:, None]
            b_out = product(b_p.to(dtype), tl.trans(b_v), None) * b_inverse
            b_out_rest = b_out
            if D > 64:
                b_out_rest = product(b_p.to(dtype), tl.trans(b_v_rest), None) * b_inverse
            store_tiles(p_out, o_row * stride_os, m_row, b_out, b_out_rest, D)
            p_q += stride_qh
            p_k += stride_kh
            p_v += stride_vh
            p_out += D
    else:  # longer than max_seqlen says: slow, but correct
        for i in tl.range(0, HEADS * tl.cdiv(length, BLOCK), num_stages=1):
            i_query = i // HEADS * BLOCK
            o_query = i_query + o_row
            m_query = o_query < length
            i_current_head = i_head + i % HEADS
            query_angles = _load_all_angles(cos_ptr, sin_ptr, i_first_row + i_query, o_row, m_query, D, ANGLE_STRIDE)
            p_q = q_ptr + (i_first_row + i_query) * stride_qs + i_current_head * stride_qh
            queries = _load_and_rotate(p_q, o_row * stride_qs, m_query, query_angles, D, INTERLEAVED)
            state = initial_state(BLOCK)
            for i_key in tl.range(0, length, BLOCK, num_stages=1):
                m_key = o_row < length - i_key
                key_angles = _load_all_angles(cos_ptr, sin_ptr, i_first_row + i_key, o_row, m_key, D, ANGLE_STRIDE)
                p_k = k_ptr + (i_first_row + i_key) * stride_ks + i_current_head * stride_kh
                keys = _load_and_rotate(p_k, o_row * stride_ks, m_key, key_angles, D, INTERLEAVED)
                p_v = v_ptr + (i_first_row + i_key) * stride_vs + i_current_head * stride_vh
                values = load_tiles(p_v, p_v + 64, o_row * stride_vs, o_row * stride_vs, m_key, D - 64)
                state = attend(queries, keys, values, m_key, state, qk_scale, D)
            _, b_sum, b_out, b_out_rest = state
            b_inverse = (1.0 / b_sum)[:, None]
            p_out = out_ptr + (i_first_row + i_query) * stride_os + i_current_head * D
            store_tiles(p_out, o_row * stride_os, m_query, b_out * b_inverse, b_out_rest * b_inverse, D)


@dataclass(frozen=True)
class WindowConfig:
    """Heads per program (one after another), warps, load stages, and the limit of registers per thread."""

    heads: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


def window_config(dtype: torch.dtype, major: int, n_heads: int, n_windows: int) -> WindowConfig:
    """Return the launch config for windows of at most MAX_WINDOW tokens (TUNING.md).

    It does not change the order of any sum. On sm_90 a limit of 168 registers lets three programs share a
    multiprocessor, or two with three load stages.
    """
    if dtype == torch.float32:  # IEEE fp32 has no tensor cores: more threads, fewer sums each
        return WindowConfig(heads=1, num_warps=8, num_stages=1, maxnreg=None)
    n_tiles = n_windows * n_heads
    wave = tuning(major).multiprocessors
    heads, num_stages = (1, 2) if n_tiles <= wave else (2, 3) if n_tiles <= 4 * wave else (2, 2)
    if 6 * wave < n_tiles <= 8 * wave:  # one wave: two programs of four heads on each multiprocessor
        heads, num_stages = 4, 3
    while n_heads % heads:
        heads //= 2
    if major != 9:
        return WindowConfig(heads, num_warps=8, num_stages=num_stages, maxnreg=None)
    return WindowConfig(heads, num_warps=4, num_stages=num_stages, maxnreg=168)


def window_attention(
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
    """Write attention within segments into `out [S, H, D]`; fast for segments of at most MAX_WINDOW tokens.

    Queries, keys and values are `[S, H, D]`; `cos` and `sin` as `rotate_by_head` takes them, or None if q and k are
    already rotated. Longer segments are correct and slow. I/O: reads Q, K, V and half of each row of angles once, and
    writes `out`. A window of L tokens takes 4 L² H D FLOPs.
    """
    S, H, D = q.shape
    n_segments = len(cu_seqlens) - 1
    q, k, v = with_small_strides(q), with_small_strides(k), with_small_strides(v)
    major = capability(q.device)[0] if q.is_cuda else 0
    # A CUDA graph's capacity may have more windows than its tokens can fill.
    config = window_config(q.dtype, major, H, min(n_segments, triton.cdiv(S, MAX_WINDOW)))
    unit = stride_unit(q, k, v)
    n_groups = H // config.heads
    options = COMPILE_OPTIONS if config.maxnreg is None else COMPILE_OPTIONS | {"maxnreg": config.maxnreg}
    _window_attention[(n_segments * n_groups,)](
        q, k, v, out, cos, sin, cu_seqlens,
        q.stride(0) // unit, q.stride(1) // unit, k.stride(0) // unit, k.stride(1) // unit,
        v.stride(0) // unit, v.stride(1) // unit, out.stride(0), n_groups, S, scale * LOG2_E,
        D=D, STRIDE_UNIT=unit, SAME_STRIDES=q.stride() == k.stride() == v.stride(),
        ANGLE_STRIDE=0 if cos is None else cos.stride(0), INTERLEAVED=interleaved, HEADS=config.heads, BLOCK=MAX_WINDOW,
        STAGES=config.num_stages, num_warps=config.num_warps, **options,
    )  # fmt: skip
