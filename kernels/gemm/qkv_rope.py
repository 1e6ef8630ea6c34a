"""QKV projection with rotary embedding: as the epilogue of the matrix product, and as one pass in place.

The epilogue would spend its time on cosines and sines if a tile were 128 neighbouring columns: 64 pairs of each row,
which in fp32 is a tenth of what the product itself reads through L2 (at M = 4096, N = 3840, K = 1280 they took the
product from 62.5 to 71.2 µs, as long as a pass of their own). So a tile takes the same channels of several units, which
share their angles, a unit being the fewest heads that split into groups of GROUP channels: with head_dim 80 and groups
of 32, a tile is one group of 4 units of 2 heads, and reads a quarter of the angles. TMA gathers those rows of the
weight as one 4-D block, and the columns go back to their places in the store.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.device import capability, multiprocessors, tuning
from qwenvit.kernels.gemm.tiles import (
    POINTER_TILE,
    TMA_TILE,
    Tile,
    accumulate,
    add_bias,
    descriptor_of,
    split_halves,
    store_tile,
    tile_at,
    uses_tma,
    wave_efficiency,
)
from qwenvit.kernels.registration import register


@triton.jit
def _angles(
    cos_ptr,  # fp32, shape (M, D), of which the first half of each row is read
    sin_ptr,  # same
    i_row,
    i_pair,
    M,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    N_PAIRS: tl.constexpr,
):
    """Cosines and sines of N_PAIRS neighbouring pairs, joined so that both are waited for at once."""
    o_row = tl.minimum(i_row + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)[:, None]
    o_angle = o_row * D + ((i_pair + tl.arange(0, N_PAIRS)) % (D // 2))[None, :]
    return tl.join(tl.load(cos_ptr + o_angle), tl.load(sin_ptr + o_angle))


@triton.jit(do_not_specialize=["M"])
def _project_and_rotate(
    x_ptr,  # shape (M, K): TMA descriptor or pointer
    w_ptr,  # shape (N, K): TMA descriptor seen as (N / UNIT, UNIT / GROUP, GROUP, K), or pointer
    bias_ptr,  # shape (N,), or None
    cos_ptr,  # fp32, shape (M, D)
    sin_ptr,  # same
    out_ptr,  # shape (M, N), N = 3·H·D
    M,
    H: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    TMA: tl.constexpr,
):
    N: tl.constexpr = 3 * H * D
    UNITS: tl.constexpr = BLOCK_N // GROUP
    N_GROUPS: tl.constexpr = UNIT // GROUP
    N_COL_TILES: tl.constexpr = (N // UNIT + UNITS - 1) // UNITS * N_GROUPS
    n_row_tiles = tl.cdiv(M, BLOCK_M)
    for i_tile in tl.range(tl.program_id(0), n_row_tiles * N_COL_TILES, tl.num_programs(0), flatten=TMA):
        i_row, i_col = tile_at(i_tile, n_row_tiles, N_COL_TILES, BAND)
        i_row *= BLOCK_M
        i_unit = i_col // N_GROUPS * UNITS
        i_group = i_col % N_GROUPS
        o_w = (i_unit + tl.arange(0, BLOCK_N) // GROUP) * UNIT + i_group * GROUP + tl.arange(0, BLOCK_N) % GROUP
        b_sum = accumulate(
            x_ptr, w_ptr, i_row, i_unit, i_group, 0, tl.minimum(o_w, N - 1), M, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )
        b_angles = _angles(cos_ptr, sin_ptr, i_row, i_group * (GROUP // 2), M, D, BLOCK_M, GROUP // 2)
        b_left, b_right = split_halves(b_sum)
        for i_half in tl.static_range(2):
            o_half = tl.arange(0, BLOCK_N // 2)
            o_col = (i_unit + i_half * (UNITS // 2) + o_half // GROUP) * UNIT + i_group * GROUP + o_half % GROUP
            b_half = add_bias(b_left if i_half == 0 else b_right, bias_ptr, o_col, N)
            if i_unit * UNIT < 2 * H * D:
                b_first, b_second = b_half.reshape(BLOCK_M, UNITS // 2, GROUP // 2, 2).split()
                b_every = tl.broadcast_to(b_angles[:, None, :, :], (BLOCK_M, UNITS // 2, GROUP // 2, 2))
                b_cos, b_sin = b_every.split()
                b_turned = tl.join(b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin)
                b_turned = b_turned.reshape(BLOCK_M, BLOCK_N // 2)
                if 2 * H * D % (UNITS * UNIT) != 0:  # K and V meet in one tile
                    b_turned = tl.where((o_col < 2 * H * D)[None, :], b_turned, b_half)
                b_half = b_turned
            store_tile(out_ptr, b_half, i_row + tl.arange(0, BLOCK_M), o_col, M, N)


@triton.jit(do_not_specialize=["M"])
def _rotate_in_place(
    qkv_ptr,  # shape (M, 3, H, D)
    cos_ptr,  # fp32, shape (M, D), of which the first half of each row is read
    sin_ptr,  # same
    M,
    H: tl.constexpr,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    N_PAIRS: tl.constexpr = H * D  # of Q and K together
    N_CHUNKS: tl.constexpr = (N_PAIRS + BLOCK_P - 1) // BLOCK_P
    i_chunk = tl.program_id(0) % N_CHUNKS
    o_row = tl.program_id(0) // N_CHUNKS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pair = i_chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    m_pair = (o_row < M)[:, None] & (o_pair < N_PAIRS)[None, :]
    o_row = o_row.to(tl.int64)[:, None]
    p_row = qkv_ptr + o_row * (3 * H * D)
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
        b_turned = tl.join(b_new_first, b_new_second).reshape(BLOCK_M, 2 * BLOCK_P)
        tl.store(p_row + o_col[None, :], b_turned.to(qkv_ptr.dtype.element_ty), mask=m_col)
    else:
        tl.store(p_first, b_new_first.to(qkv_ptr.dtype.element_ty), mask=m_pair)
        tl.store(p_first + D // 2, b_new_second.to(qkv_ptr.dtype.element_ty), mask=m_pair)


@dataclass(frozen=True)
class RotatePass:
    """Rows and pairs of one program of the pass in place."""

    rows: int
    pairs: int
    num_warps: int


ROTATE_PASS = RotatePass(rows=2, pairs=256, num_warps=4)
"""The fastest or within 1 % of it with adjacent pairs, head_dim 64, 72 and 80 and M = 4096 to 16384. With head_dim 80,
12.6, 26.4 and 45.5 µs at M = 4096, 9216 and 16384: 81, 87 and 90 % of copy bandwidth, where a copy of as many bytes
reaches 83, 91 and 95 %. The worst of 1 to 8 rows, 256 to 1024 pairs and 4 or 8 warps took 10 % longer, programs that
stay resident 2 %, a head to a row of the block 34 %."""


def group_of(N: int, D: int) -> int:
    """Neighbouring channels a tile takes of each unit: the most that divide the columns, up to 32.

    At M = 4096 groups of 16, 32 and 64 took 66.8, 66.7 and 69.3 µs with head_dim 80, 57.8, 56.3 and 58.2 with 72, and
    44.6, 43.2 and 44.2 with 64: smaller ones write fewer bytes in a row, larger ones read more angles.
    """
    return next(group for group in (32, 16, 8, 4) if N % math.lcm(D, group) == 0)


def fused_is_faster(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether the fused kernel beats cuBLAS and the pass, adjacent pairs given: where its rounds are full enough.

    The narrower the tower, the more the pass is of the whole, and the less full they need to be. Of 36 cases
    (N = 3840, 3456, 3072, 2304 of the published towers, M = 784 to 16384) the 26 chosen gain 0.99 to 1.22 times, and
    the 10 others would gain 0.83 to 1.01 times.
    """
    M, K = hidden_states.shape
    n_tiles = triton.cdiv(M, TMA_TILE.block_m) * triton.cdiv(weight.shape[0], TMA_TILE.block_n)
    tuned = tuning(capability(hidden_states.device)[0])
    return wave_efficiency(n_tiles, hidden_states) >= min(tuned.qkv_wave_efficiency, K / tuned.narrow_width)


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
    """The fused kernel: rotary pairs adjacent, `[S, C]` -> `[S, 3·H·D]`; `group` channels of a head to a tile."""
    M, K = hidden_states.shape
    N = weight.shape[0]
    out = hidden_states.new_empty((M, N))
    if M == 0:
        return out
    D = N // (3 * num_heads)
    tma = uses_tma(hidden_states, weight)
    tile = tile or (TMA_TILE if tma else POINTER_TILE)
    group = group or group_of(N, D)
    unit = math.lcm(D, group)
    units = tile.block_n // group
    x, w = hidden_states, weight
    if tma:
        x = descriptor_of(x, [M, K], [tile.block_m, tile.block_k])
        w = descriptor_of(w, [N // unit, unit // group, group, K], [units, 1, group, tile.block_k])
    n_tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N // unit, units) * (unit // group)
    with torch.cuda.device_of(out):  # Triton launches on the current device, which need not be the tensor's
        _project_and_rotate[(min(n_tiles, tile.programs * multiprocessors(out.device)),)](
            x, w, bias, cos, sin, out, M,
            H=num_heads, D=D, K=K, UNIT=unit, GROUP=group,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=tile.band, TMA=tma,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> None:
    """Rotate Q and K of packed `[S, 3·H·D]` in place; see `qwenvit.ops.rotate_qk_`."""
    M, width = qkv.shape
    if M == 0:
        return
    n_chunks = triton.cdiv(width // 3, ROTATE_PASS.pairs)
    with torch.cuda.device_of(qkv):
        _rotate_in_place[(triton.cdiv(M, ROTATE_PASS.rows) * n_chunks,)](
            qkv, cos, sin, M,
            H=num_heads, D=width // (3 * num_heads), INTERLEAVED=interleaved,
            BLOCK_M=ROTATE_PASS.rows, BLOCK_P=ROTATE_PASS.pairs, num_warps=ROTATE_PASS.num_warps,
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
    """Projection and rotation, `[S, C]` -> `[S, 3·H·D]`; see `qwenvit.ops.qkv_rope`."""
    if interleaved and fused_is_faster(hidden_states, weight):
        return project_and_rotate(hidden_states, weight, bias, cos, sin, num_heads)
    qkv = F.linear(hidden_states, weight, bias)
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
