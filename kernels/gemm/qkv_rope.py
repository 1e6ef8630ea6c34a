"""QKV projection with rotary embedding, fused into the matrix product or as cuBLAS and one pass in place.

A fused tile of 128 neighbouring columns would need 64 cosines and 64 sines for each row, and reading them would cost
as much time as a separate pass (TUNING.md). So a tile takes GROUP neighbouring channels at the same place of several
units, which share their angles. A unit is the fewest heads whose channels split evenly into groups: with head_dim 80
and groups of 32, a unit is 2 heads (160 channels, 5 groups), and a tile of 128 columns is one group of 4 units, which
needs a quarter of the angles. TMA gathers those rows of the weight as one 4-D block. The store writes the columns to
their places.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.device import capability, multiprocessors, tuning
from qwenvit.kernels.gemm.cublas import linear
from qwenvit.kernels.gemm.tiles import (
    POINTER_TILE,
    TMA_TILE,
    Tile,
    accumulate,
    add_bias,
    can_beat_cublas,
    make_descriptor,
    split_halves,
    store_tile,
    tile_at,
    uses_tma,
)
from qwenvit.kernels.registration import register


@triton.jit
def _load_angles(
    cos_ptr,  # fp32, shape (M, D); only the first D / 2 columns are read
    sin_ptr,  # fp32, shape (M, D); only the first D / 2 columns are read
    i_row,
    i_pair,
    M,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N_PAIRS: tl.constexpr,
):
    """Return cosines and sines of N_PAIRS neighbouring pairs, (BLOCK_M, N_PAIRS, 2): joined, they share one wait."""
    o_row = tl.minimum(i_row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)[:, None]
    o_angle = o_row * D + ((i_pair + tl.arange(0, N_PAIRS)) % (D // 2))[None, :]
    return tl.join(tl.load(cos_ptr + o_angle), tl.load(sin_ptr + o_angle))


@triton.jit(do_not_specialize=["M"])
def _project_and_rotate(
    x_ptr,  # shape (M, K): TMA descriptor or pointer
    w_ptr,  # shape (N, K): TMA descriptor of shape (N / UNIT, UNIT / GROUP, GROUP, K), or pointer
    bias_ptr,  # shape (N,), or None
    cos_ptr,  # fp32, shape (M, D); only the first D / 2 columns are read
    sin_ptr,  # fp32, shape (M, D); only the first D / 2 columns are read
    out_ptr,  # shape (M, N), N = 3·H·D
    M,
    H: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,  # columns of a unit
    GROUP: tl.constexpr,  # columns of a group
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    TMA: tl.constexpr,
):
    N: tl.constexpr = 3 * H * D
    TILE_UNITS: tl.constexpr = BLOCK_N // GROUP
    N_GROUPS: tl.constexpr = UNIT // GROUP
    N_COL_TILES: tl.constexpr = (N // UNIT + TILE_UNITS - 1) // TILE_UNITS * N_GROUPS
    n_row_tiles = tl.cdiv(M, BLOCK_M)
    for i_tile in tl.range(tl.program_id(0), n_row_tiles * N_COL_TILES, tl.num_programs(0), flatten=TMA):
        i_row, i_col = tile_at(i_tile, n_row_tiles, N_COL_TILES, BAND)
        i_row *= BLOCK_M
        i_unit = i_col // N_GROUPS * TILE_UNITS
        i_group = i_col % N_GROUPS
        o_w = (i_unit + tl.arange(0, BLOCK_N) // GROUP) * UNIT + i_group * GROUP + tl.arange(0, BLOCK_N) % GROUP
        b_acc = accumulate(
            x_ptr, w_ptr, i_row, i_unit, i_group, 0, tl.minimum(o_w, N - 1), M, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )
        b_angles = _load_angles(cos_ptr, sin_ptr, i_row, i_group * (GROUP // 2), M, D, BLOCK_M, GROUP // 2)
        b_left, b_right = split_halves(b_acc)
        for i_half in tl.static_range(2):
            o_half = tl.arange(0, BLOCK_N // 2)
            o_col = (i_unit + i_half * (TILE_UNITS // 2) + o_half // GROUP) * UNIT + i_group * GROUP + o_half % GROUP
            b_half = add_bias(b_left if i_half == 0 else b_right, bias_ptr, o_col, N)
            if i_unit * UNIT < 2 * H * D:
                b_first, b_second = b_half.reshape(BLOCK_M, TILE_UNITS // 2, GROUP // 2, 2).split()
                b_unit_angles = tl.broadcast_to(b_angles[:, None, :, :], (BLOCK_M, TILE_UNITS // 2, GROUP // 2, 2))
                b_cos, b_sin = b_unit_angles.split()
                b_rotated = tl.join(b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin)
                b_rotated = b_rotated.reshape(BLOCK_M, BLOCK_N // 2)
                if 2 * H * D % (TILE_UNITS * UNIT) != 0:  # a tile may have columns of both K and V
                    b_rotated = tl.where((o_col < 2 * H * D)[None, :], b_rotated, b_half)
                b_half = b_rotated
            store_tile(out_ptr, b_half, i_row + tl.arange(0, BLOCK_M), o_col, M, N)


@triton.jit(do_not_specialize=["M"])
def _rotate_in_place(
    qkv_ptr,  # shape (M, WIDTH), overwritten: Q and K, (H, D) each, then V, (H, D) or wider
    cos_ptr,  # fp32, shape (M, D); only the first D / 2 columns are read
    sin_ptr,  # fp32, shape (M, D); only the first D / 2 columns are read
    M,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_ONES: tl.constexpr,  # ones beside V in a row, rounded up to a power of two
):
    N_PAIRS: tl.constexpr = H * D  # rotary pairs of Q and K together
    N_CHUNKS: tl.constexpr = (N_PAIRS + BLOCK_P - 1) // BLOCK_P
    i_chunk = tl.program_id(0) % N_CHUNKS
    o_row = tl.program_id(0) // N_CHUNKS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pair = i_chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    m_pair = (o_row < M)[:, None] & (o_pair < N_PAIRS)[None, :]
    o_row = o_row.to(tl.int64)[:, None]
    p_row = qkv_ptr + o_row * WIDTH
    if INTERLEAVED:
        o_col = 2 * i_chunk * BLOCK_P + tl.arange(0, 2 * BLOCK_P)
        m_col = (o_row < M) & (o_col < 2 * N_PAIRS)[None, :]
        b_pairs = tl.load(p_row + o_col[None, :], mask=m_col, other=0.0).to(tl.float32)
        b_first, b_second = b_pairs.reshape(BLOCK_M, BLOCK_P, 2).split()
    else:
        p_first = p_row + (o_pair // (D // 2) * D + o_pair % (D // 2))[None, :]
        b_first = tl.load(p_first, mask=m_pair, other=0.0).to(tl.float32)
        b_second = tl.load(p_first + D // 2, mask=m_pair, other=0.0).to(tl.float32)
    o_angle = o_row * D + (o_pair % (D // 2))[None, :]
    b_cos = tl.load(cos_ptr + o_angle, mask=m_pair, other=0.0)
    b_sin = tl.load(sin_ptr + o_angle, mask=m_pair, other=0.0)
    b_new_first = b_first * b_cos - b_second * b_sin
    b_new_second = b_second * b_cos + b_first * b_sin
    if INTERLEAVED:
        b_rotated = tl.join(b_new_first, b_new_second).reshape(BLOCK_M, 2 * BLOCK_P)
        tl.store(p_row + o_col[None, :], b_rotated.to(qkv_ptr.dtype.element_ty), mask=m_col)
    else:
        tl.store(p_first, b_new_first.to(qkv_ptr.dtype.element_ty), mask=m_pair)
        tl.store(p_first + D // 2, b_new_second.to(qkv_ptr.dtype.element_ty), mask=m_pair)
    V_WIDTH: tl.constexpr = WIDTH // H - 2 * D
    if V_WIDTH > D:  # noqa: SIM102 (known when compiling)
        if i_chunk == N_CHUNKS - 1:  # which has the fewest pairs
            o_one = tl.arange(0, BLOCK_ONES)
            o_channel = o_one // (V_WIDTH - D) * V_WIDTH + D + o_one % (V_WIDTH - D)
            m_one = (o_row < M) & (o_one < H * (V_WIDTH - D))[None, :]
            b_one = tl.full([BLOCK_M, BLOCK_ONES], 1.0, qkv_ptr.dtype.element_ty)
            tl.store(p_row + (2 * H * D + o_channel)[None, :], b_one, mask=m_one)


@dataclass(frozen=True)
class RotatePass:
    """Launch config of `_rotate_in_place`: rows and rotary pairs of a program."""

    rows: int
    pairs: int
    num_warps: int


ROTATE_PASS = RotatePass(rows=2, pairs=256, num_warps=4)
"""The fastest, or within 1 % of it, for adjacent pairs in the published towers (TUNING.md)."""


def channel_group(N: int, D: int) -> int:
    """Return the neighbouring channels of a unit that a tile takes: the most, up to 32, that give N whole units.

    Smaller groups write fewer contiguous bytes; larger ones read more angles.
    """
    return next(group for group in (32, 16, 8, 4) if N % math.lcm(D, group) == 0)


def is_fused(weight: Tensor) -> bool:
    """Return whether the fused kernel runs, for adjacent pairs, rather than cuBLAS and a pass, which round first.

    The number of rows plays no part, so that a row has the same bits in every batch. In narrow towers the pass is a
    larger share of the time, and the fused kernel is faster; in wide ones its gain for large images is smaller than its
    loss for small ones (TUNING.md).
    """
    return can_beat_cublas(weight) and weight.shape[1] <= tuning(capability(weight.device)[0]).fused_qkv_width


def project_and_rotate(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    tile: Tile | None = None,
    group: int | None = None,
) -> Tensor:
    """Run the fused kernel, `[S, C]` -> `[S, 3·H·D]`, on adjacent rotary pairs; `group`: see `channel_group`."""
    M, K = hidden_states.shape
    N = weight.shape[0]
    out = hidden_states.new_empty((M, N))
    if M == 0:
        return out
    D = N // (3 * num_heads)
    tma = uses_tma(hidden_states, weight)
    tile = tile or (TMA_TILE if tma else POINTER_TILE)
    group = group or channel_group(N, D)
    unit = math.lcm(D, group)
    tile_units = tile.block_n // group
    x, w = hidden_states, weight
    if tma:
        x = make_descriptor(x, [M, K], [tile.block_m, tile.block_k])
        w = make_descriptor(w, [N // unit, unit // group, group, K], [tile_units, 1, group, tile.block_k])
    n_tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N // unit, tile_units) * (unit // group)
    with torch.cuda.device_of(out):  # Triton launches on the current device, which need not be the tensor's
        _project_and_rotate[(min(n_tiles, tile.programs * multiprocessors(out.device)),)](
            x, w, bias, cos, sin, out, M,
            H=num_heads, D=D, K=K, UNIT=unit, GROUP=group,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=tile.band, TMA=tma,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **COMPILE_OPTIONS,
        )  # fmt: skip
    return out


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> None:
    """Rotate Q and K of packed `[S, N]` in place, and write ones beside V; see `qwenvit.ops.rotate_qk_`.

    I/O: reads and writes Q and K, reads half of cos and sin, writes the ones.
    """
    M, width = qkv.shape
    if M == 0:
        return
    D = cos.shape[1]
    n_chunks = triton.cdiv(num_heads * D, ROTATE_PASS.pairs)
    with torch.cuda.device_of(qkv):
        _rotate_in_place[(triton.cdiv(M, ROTATE_PASS.rows) * n_chunks,)](
            qkv, cos, sin, M,
            H=num_heads, D=D, WIDTH=width, INTERLEAVED=interleaved,
            BLOCK_M=ROTATE_PASS.rows, BLOCK_P=ROTATE_PASS.pairs,
            BLOCK_ONES=triton.next_power_of_2(width - 3 * num_heads * D), num_warps=ROTATE_PASS.num_warps,
            **COMPILE_OPTIONS,
        )  # fmt: skip


def qkv_rope(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    interleaved: bool,
) -> Tensor:
    """Return the projection with Q and K rotated, `[S, C]` -> `[S, N]`; see `qwenvit.ops.qkv_rope`."""
    v_is_padded = weight.shape[0] != 3 * num_heads * cos.shape[1]
    if interleaved and not v_is_padded and is_fused(weight):
        return project_and_rotate(hidden_states, weight, bias, cos, sin, num_heads)
    qkv = linear(hidden_states, weight, bias)
    rotate_qk_(qkv, cos, sin, num_heads, interleaved)
    return qkv


rotate_qk_op = register(
    "rotate_qk_(Tensor(a!) qkv, Tensor cos, Tensor sin, int num_heads, bool interleaved) -> ()",
    rotate_qk_,
    lambda *_: None,
)
qkv_rope_op = register(
    "qkv_rope(Tensor hidden_states, Tensor weight, Tensor? bias, Tensor cos, Tensor sin, int num_heads, "
    "bool interleaved) -> Tensor",
    qkv_rope,
    lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[0])),
)
