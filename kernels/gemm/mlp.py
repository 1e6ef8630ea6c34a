"""First half of the MLP: projection, bias and activation, fused into the matrix product or as cuBLAS and one pass.

SwiGLU's gate and up projections are one product. The rows of its weight alternate gate and up
(`qwenvit.packing.pack_gate_up`), so that one thread's registers have both numbers of an output.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.device import multiprocessors
from qwenvit.kernels.gemm.cublas import linear, linear_gelu_tanh
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

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _mul_sigmoid(b_x, b_y, EXACT: tl.constexpr):
    """Return x · sigmoid(y)."""
    b_denominator = 1.0 + tl.exp2(b_y * -LOG2_E)
    if EXACT:
        return tl.div_rn(b_x, b_denominator)
    b_root = tl.rsqrt(b_denominator)  # two instructions fewer than a division
    return b_x * (b_root * b_root)


@triton.jit
def _erf_gelu(b_x):
    """Return exact (erf) GELU in half of erf's instructions: max(x, 0) - a · Φ(-a), a = |x|.

    Φ(-a) = exp(-a² / 2) · t · P(t), t = 1 / (1 + 0.3 a), as in Abramowitz and Stegun 7.1.26. P has degree 5 and the
    smallest maximum relative error (1.6e-6), so the negative tail is as accurate as the rest.
    """
    b_a = tl.minimum(tl.abs(b_x), 40.0, propagate_nan=tl.PropagateNan.ALL)  # Φ(-40) is 0 in fp32; inf · 0 would be NaN
    b_root = tl.rsqrt(1.0 + 0.3 * b_a)
    b_t = b_root * b_root
    b_p = 0.232915187 - 0.082585961 * b_t
    b_p = b_p * b_t - 0.036836977
    b_p = b_p * b_t + 0.155371389
    b_p = b_p * b_t + 0.110759886
    b_p = b_p * b_t + 0.120375808
    return tl.maximum(b_x, 0.0) - b_a * b_t * b_p * tl.exp2(b_a * b_a * (-0.5 * LOG2_E))


@triton.jit
def _activation(b_x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """Return the activation in fp32, accurate to fp32's last bits if EXACT, else to more than 16-bit outputs need."""
    if ACT == "gelu_tanh":  # 0.5 · (1 + tanh y) = sigmoid(2 y), y = √(2/π) · (x + 0.044715 x³)
        b_x = _mul_sigmoid(b_x, b_x * (1.5957691216057308 + 0.07135481627260025 * b_x * b_x), EXACT)
    elif ACT == "quick_gelu":
        b_x = _mul_sigmoid(b_x, 1.702 * b_x, EXACT)
    elif ACT == "gelu":
        if EXACT:
            b_x *= 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        else:
            b_x = _erf_gelu(b_x)
    else:
        tl.static_assert(ACT == "silu")
        b_x = _mul_sigmoid(b_x, b_x, EXACT)
    return b_x


@triton.jit(do_not_specialize=["M"])
def _project_and_activate(
    x_ptr,  # shape (M, K): TMA descriptor or pointer
    w_ptr,  # shape (N, K): TMA descriptor of shape (1, 1, N, K), or pointer
    bias_ptr,  # shape (N,), or None
    out_ptr,  # shape (M, N), or (M, N / 2) if GATED
    M,
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
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    N_COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    n_row_tiles = tl.cdiv(M, BLOCK_M)
    for i_tile in tl.range(tl.program_id(0), n_row_tiles * N_COL_TILES, tl.num_programs(0), flatten=TMA):
        i_row, i_col = tile_at(i_tile, n_row_tiles, N_COL_TILES, BAND)
        i_row *= BLOCK_M
        i_col *= BLOCK_N
        o_w = tl.minimum(i_col + tl.arange(0, BLOCK_N), N - 1)
        b_acc = accumulate(x_ptr, w_ptr, i_row, 0, 0, i_col, o_w, M, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        o_row = i_row + tl.arange(0, BLOCK_M)
        b_left, b_right = split_halves(b_acc)
        for i_half in tl.static_range(2):
            i_half_col = i_col + i_half * (BLOCK_N // 2)
            o_col = i_half_col + tl.arange(0, BLOCK_N // 2)
            b_half = add_bias(b_left if i_half == 0 else b_right, bias_ptr, o_col, N)
            if GATED:
                b_gate, b_up = b_half.reshape(BLOCK_M, BLOCK_N // 4, 2).split()
                o_out = i_half_col // 2 + tl.arange(0, BLOCK_N // 4)
                store_tile(out_ptr, _activation(b_gate, ACT, EXACT) * b_up, o_row, o_out, M, N // 2)
            else:
                store_tile(out_ptr, _activation(b_half, ACT, EXACT), o_row, o_col, M, N)


@triton.jit(do_not_specialize=["M"])
def _activate(
    x_ptr,  # shape (M, N), overwritten
    M,
    N: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < M.to(tl.int64) * N
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = _activation(b_x, ACT, x_ptr.dtype.element_ty == tl.float32)
    tl.store(x_ptr + o_x, b_x.to(x_ptr.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["M"])
def _swiglu(
    gate_up_ptr,  # shape (M, N, 2): gate, up
    out_ptr,  # shape (M, N)
    M,
    N: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    N_CHUNKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_col = tl.program_id(0) % N_CHUNKS * BLOCK_N
    o_row = tl.program_id(0) // N_CHUNKS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_pair = 2 * i_col + tl.arange(0, 2 * BLOCK_N)
    m_pair = (o_row < M)[:, None] & (o_pair < 2 * N)[None, :]
    p_pair = gate_up_ptr + o_row.to(tl.int64)[:, None] * (2 * N) + o_pair[None, :]
    b_pairs = tl.load(p_pair, mask=m_pair, other=0.0).to(tl.float32)
    b_gate, b_up = b_pairs.reshape(BLOCK_M, BLOCK_N, 2).split()
    store_tile(out_ptr, _activation(b_gate, ACT, EXACT) * b_up, o_row, i_col + tl.arange(0, BLOCK_N), M, N)


@dataclass(frozen=True)
class GatePass:
    """Launch config of `_swiglu`: output rows and columns of a program."""

    rows: int
    cols: int
    num_warps: int


@dataclass(frozen=True)
class ActivationPass:
    """Launch config of `_activate`: elements of a program."""

    block: int
    num_warps: int


GATE_PASS = GatePass(rows=2, cols=2048, num_warps=8)
"""The fastest of nine shapes, which differ little (TUNING.md)."""
ACTIVATION_PASS = ActivationPass(block=2048, num_warps=4)
"""As fast as a copy of as many bytes, for every activation (TUNING.md)."""


def is_fused(weight: Tensor, act: str) -> bool:
    """Return whether the fused kernel runs, rather than cuBLAS and a pass, which round the product first.

    The number of rows plays no part, so that a row has the same bits in every batch. The fused kernel is faster at
    most sizes (TUNING.md), except with exact GELU: only mergers have it, and cuBLAS is as fast at their sizes.
    """
    return act != "gelu" and can_beat_cublas(weight)


def project_and_activate(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, gated: bool, tile: Tile | None = None
) -> Tensor:
    """Run the fused kernel: `[S, K]` -> `[S, N]`, or `[S, N / 2]` if gated: the weight's rows alternate gate and up."""
    M, K = x.shape
    N = weight.shape[0]
    out = x.new_empty((M, N // 2 if gated else N))
    if M == 0:
        return out
    tma = uses_tma(x, weight)
    tile = tile or (TMA_TILE if tma else POINTER_TILE)
    x_operand, w_operand = x, weight
    if tma:
        x_operand = make_descriptor(x, [M, K], [tile.block_m, tile.block_k])
        w_operand = make_descriptor(weight, [1, 1, N, K], [1, 1, tile.block_n, tile.block_k])
    n_tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    with torch.cuda.device_of(out):  # Triton launches on the current device, which need not be the tensor's
        _project_and_activate[(min(n_tiles, tile.programs * multiprocessors(out.device)),)](
            x_operand, w_operand, bias, out, M,
            N=N, K=K, ACT=act, GATED=gated,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=tile.band, TMA=tma,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **COMPILE_OPTIONS,
        )  # fmt: skip
    return out


def activation_(x: Tensor, act: str) -> None:
    """Apply `act` to each element in place; see `qwenvit.ops.activation_`.

    I/O: reads x, writes x.
    """
    M, N = x.shape
    if M == 0 or N == 0:
        return
    config = ACTIVATION_PASS
    with torch.cuda.device_of(x):
        _activate[(triton.cdiv(M * N, config.block),)](
            x, M, N=N, ACT=act, BLOCK=config.block, num_warps=config.num_warps, **COMPILE_OPTIONS
        )


def swiglu_pass(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up of packed columns, `[S, 2·I]` -> `[S, I]`; see `qwenvit.ops.swiglu_pass`.

    I/O: reads gate_up, writes half as many bytes.
    """
    M, N = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((M, N))
    if M == 0 or N == 0:
        return out
    config = GATE_PASS
    with torch.cuda.device_of(out):
        _swiglu[(triton.cdiv(M, config.rows) * triton.cdiv(N, config.cols),)](
            gate_up, out, M,
            N=N, ACT="silu", BLOCK_M=config.rows, BLOCK_N=config.cols, num_warps=config.num_warps, **COMPILE_OPTIONS,
        )  # fmt: skip
    return out


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Return `act` of the projection; see `qwenvit.ops.linear_act`.

    Tanh-GELU in 16 bits uses cuBLASLt's own epilogue, which is faster than the fused kernel and the pass (TUNING.md).
    """
    aligned = weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0  # 16 bytes, which that epilogue needs
    if act == "gelu_tanh" and bias is not None and x.is_cuda and x.dtype != torch.float32 and aligned:
        return linear_gelu_tanh(x, weight, bias)
    if is_fused(weight, act):
        return project_and_activate(x, weight, bias, act, False)
    out = linear(x, weight, bias)
    activation_(out, act)
    return out


def swiglu(x: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor | None) -> Tensor:
    """Return silu(gate) · up of the projection; see `qwenvit.ops.swiglu`."""
    if is_fused(gate_up_weight, "swiglu"):
        return project_and_activate(x, gate_up_weight, gate_up_bias, "silu", True)
    return swiglu_pass(linear(x, gate_up_weight, gate_up_bias))


def _empty_output(x: Tensor, columns: int) -> Tensor:
    return x.new_empty((x.shape[0], columns))


activation_op = register("activation_(Tensor(a!) x, str act) -> ()", activation_, lambda *_: None)
swiglu_pass_op = register(
    "swiglu_pass(Tensor gate_up) -> Tensor", swiglu_pass, lambda x: _empty_output(x, x.shape[1] // 2)
)
linear_act_op = register(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor",
    linear_act,
    lambda x, weight, *_: _empty_output(x, weight.shape[0]),
)
swiglu_op = register(
    "swiglu(Tensor x, Tensor gate_up_weight, Tensor? gate_up_bias) -> Tensor",
    swiglu,
    lambda x, weight, *_: _empty_output(x, weight.shape[0] // 2),
)
