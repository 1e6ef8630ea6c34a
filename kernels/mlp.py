"""First half of the MLP: projection, bias and activation, as the epilogue of the matrix product and as one pass.

SwiGLU's gate and up projections are one product whose weight alternates their rows (`qwenvit.packing.pack_gate_up`),
so that both numbers of an output lie in one thread's registers.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.gemm import (
    Tile,
    accumulate,
    add_bias,
    aligned,
    describe,
    halves,
    has_tma,
    on_device_of,
    share,
    store_tile,
    tile_at,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(b_x):
    b_root = tl.rsqrt(1.0 + tl.exp2(b_x * -LOG2_E))
    return b_root * b_root  # a division costs four instructions more, in an epilogue short of issue slots


@triton.jit
def _activation(b_x, ACT: tl.constexpr):
    if ACT == "gelu_tanh":  # 0.5 · (1 + tanh y) = sigmoid(2 y), y = √(2/π) · (x + 0.044715 x³)
        b_x *= _sigmoid(b_x * (1.5957691216057308 + 0.07135481627260025 * b_x * b_x))
    elif ACT == "quick_gelu":
        b_x *= _sigmoid(1.702 * b_x)
    elif ACT == "gelu":
        b_x *= 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
    else:
        tl.static_assert(ACT == "silu")
        b_x *= _sigmoid(b_x)
    return b_x


@triton.jit
def _activated_tile(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    i_row,
    i_col,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    o_w = tl.minimum(i_col + tl.arange(0, BLOCK_N), N - 1)
    b_sum = accumulate(x_ptr, w_ptr, i_row, 0, 0, i_col, o_w, M, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
    o_row = i_row + tl.arange(0, BLOCK_M)
    b_left, b_right = halves(b_sum)
    for i_half in tl.static_range(2):
        i_half_col = i_col + i_half * (BLOCK_N // 2)
        o_col = i_half_col + tl.arange(0, BLOCK_N // 2)
        b_half = add_bias(b_left if i_half == 0 else b_right, bias_ptr, o_col, N)
        if GATED:
            b_gate, b_up = b_half.reshape(BLOCK_M, BLOCK_N // 4, 2).split()
            o_out = i_half_col // 2 + tl.arange(0, BLOCK_N // 4)
            store_tile(out_ptr, _activation(b_gate, ACT) * b_up, o_row, o_out, M, N // 2)
        else:
            store_tile(out_ptr, _activation(b_half, ACT), o_row, o_col, M, N)


@triton.jit(do_not_specialize=["M", "n_whole"])
def _project_and_activate(
    x_ptr,  # shape (M, K): TMA descriptor with blocks of BLOCK_M rows, or pointer
    x_half_ptr,  # same, with blocks of BLOCK_M / 2 rows
    w_ptr,  # shape (N, K): TMA descriptor seen as (1, 1, N, K), or pointer
    bias_ptr,  # shape (N,), or None
    out_ptr,  # shape (M, N), or (M, N / 2) where gated
    M,
    n_whole,  # tiles computed whole; the rest in halves
    N: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    TMA: tl.constexpr,
):
    N_COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    HALF_M: tl.constexpr = BLOCK_M // 2
    n_row_tiles = tl.cdiv(M, BLOCK_M)
    for i_tile in tl.range(tl.program_id(0), n_whole, tl.num_programs(0), flatten=TMA):
        i_row, i_col = tile_at(i_tile, n_row_tiles, N_COL_TILES, BAND)
        _activated_tile(
            x_ptr, w_ptr, bias_ptr, out_ptr, i_row * BLOCK_M, i_col * BLOCK_N, M,
            N, K, ACT, GATED, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip
    n_halves = 2 * n_row_tiles * N_COL_TILES
    for i_half in tl.range(2 * n_whole + tl.program_id(0), n_halves, tl.num_programs(0), flatten=TMA):
        i_row, i_col = tile_at(i_half // 2, n_row_tiles, N_COL_TILES, BAND)
        _activated_tile(
            x_half_ptr, w_ptr, bias_ptr, out_ptr, i_row * BLOCK_M + i_half % 2 * HALF_M, i_col * BLOCK_N, M,
            N, K, ACT, GATED, HALF_M, BLOCK_N, BLOCK_K, TMA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _activate(
    x_ptr,  # shape (M, N)
    M,
    N: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    N_CHUNKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    o_row = tl.program_id(0) // N_CHUNKS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_col = tl.program_id(0) % N_CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
    m_x = (o_row < M)[:, None] & (o_col < N)[None, :]
    p_x = x_ptr + o_row.to(tl.int64)[:, None] * N + o_col[None, :]
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_x, _activation(b_x, ACT).to(x_ptr.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["M"])
def _gate(
    gate_up_ptr,  # shape (M, N, 2)
    out_ptr,  # shape (M, N)
    M,
    N: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    N_CHUNKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_col = tl.program_id(0) % N_CHUNKS * BLOCK_N
    o_row = tl.program_id(0) // N_CHUNKS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pair = 2 * i_col + tl.arange(0, 2 * BLOCK_N)
    m_pair = (o_row < M)[:, None] & (o_pair < 2 * N)[None, :]
    p_pair = gate_up_ptr + o_row.to(tl.int64)[:, None] * (2 * N) + o_pair[None, :]
    b_pairs = tl.load(p_pair, mask=m_pair, other=0.0).to(tl.float32)
    b_gate, b_up = b_pairs.reshape(BLOCK_M, BLOCK_N, 2).split()
    store_tile(out_ptr, _activation(b_gate, ACT) * b_up, o_row, i_col + tl.arange(0, BLOCK_N), M, N)


PASS_ROWS, PASS_COLS, PASS_WARPS = 2, 1024, 8

TILE = Tile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3, programs=2)


def fused_wins(x: Tensor, weight: Tensor, act: str) -> bool:
    """Whether the fused kernel beats cuBLAS and the pass."""
    return x.dtype != torch.float32


def project_and_activate(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, gated: bool, tile: Tile) -> Tensor:
    """The fused kernel: `[S, K]` -> `[S, N]`, or `[S, N / 2]` of an alternating gate and up weight."""
    M, K = x.shape
    N = weight.shape[0]
    out = x.new_empty((M, N // 2 if gated else N))
    if M == 0:
        return out
    whole, half, w = x, x, weight
    tma = has_tma(x.device) and aligned(x, weight)
    if tma:
        whole = describe(x, [M, K], [tile.block_m, tile.block_k])
        half = describe(x, [M, K], [tile.block_m // 2, tile.block_k])
        w = describe(weight, [1, 1, N, K], [1, 1, tile.block_n, tile.block_k])
    n_tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    programs, n_whole = share(n_tiles, tile, x.device)
    with on_device_of(out):
        _project_and_activate[(programs,)](
            whole, half, w, bias, out, M, n_whole,
            N=N, K=K, ACT=act, GATED=gated,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=tile.band, TMA=tma,
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
        )  # fmt: skip
    return out


def activation_(x: Tensor, act: str) -> None:
    """`act` of each element, in place; see `qwenvit.ops.activation_`."""
    M, N = x.shape
    if M and N:
        grid = (triton.cdiv(M, PASS_ROWS) * triton.cdiv(N, PASS_COLS),)
        with on_device_of(x):
            _activate[grid](x, M, N=N, ACT=act, BLOCK_M=PASS_ROWS, BLOCK_N=PASS_COLS, num_warps=PASS_WARPS)


def swiglu_pass(gate_up: Tensor) -> Tensor:
    """`[S, 2·I]` -> `[S, I]`; see `qwenvit.ops.swiglu_pass`."""
    M, N = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((M, N))
    if M and N:
        grid = (triton.cdiv(M, PASS_ROWS) * triton.cdiv(N, PASS_COLS),)
        with on_device_of(out):
            _gate[grid](gate_up, out, M, N=N, ACT="silu", BLOCK_M=PASS_ROWS, BLOCK_N=PASS_COLS, num_warps=PASS_WARPS)
    return out


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """`act` of the projection; see `qwenvit.ops.linear_act`."""
    if fused_wins(x, weight, act):
        return project_and_activate(x, weight, bias, act, False, TILE)
    out = F.linear(x, weight, bias)
    activation_(out, act)
    return out


def swiglu(x: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor | None) -> Tensor:
    """silu(gate) · up; see `qwenvit.ops.swiglu`."""
    if fused_wins(x, gate_up_weight, "swiglu"):
        return project_and_activate(x, gate_up_weight, gate_up_bias, "silu", True, TILE)
    return swiglu_pass(F.linear(x, gate_up_weight, gate_up_bias))


_LIBRARY = torch.library.Library("qwenvit", "FRAGMENT")
_LIBRARY.define("activation_(Tensor(a!) x, str act) -> ()")
_LIBRARY.define("swiglu_pass(Tensor gate_up) -> Tensor")
_LIBRARY.define("linear_act(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor")
_LIBRARY.define("swiglu(Tensor x, Tensor gate_up_weight, Tensor? gate_up_bias) -> Tensor")
for _device in ("CUDA", "CPU"):  # the CPU for Triton's interpreter
    _LIBRARY.impl("activation_", activation_, _device)
    _LIBRARY.impl("swiglu_pass", swiglu_pass, _device)
    _LIBRARY.impl("linear_act", linear_act, _device)
    _LIBRARY.impl("swiglu", swiglu, _device)


def _empty(x: Tensor, columns: int) -> Tensor:
    return x.new_empty((x.shape[0], columns))


torch.library.register_fake("qwenvit::activation_", lambda *_: None, lib=_LIBRARY)
torch.library.register_fake("qwenvit::swiglu_pass", lambda x: _empty(x, x.shape[1] // 2), lib=_LIBRARY)
torch.library.register_fake("qwenvit::linear_act", lambda x, weight, *_: _empty(x, weight.shape[0]), lib=_LIBRARY)
torch.library.register_fake("qwenvit::swiglu", lambda x, weight, *_: _empty(x, weight.shape[0] // 2), lib=_LIBRARY)
activation_op = torch.ops.qwenvit.activation_.default
swiglu_pass_op = torch.ops.qwenvit.swiglu_pass.default
linear_act_op = torch.ops.qwenvit.linear_act.default
swiglu_op = torch.ops.qwenvit.swiglu.default
