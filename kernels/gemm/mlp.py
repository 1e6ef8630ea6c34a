"""First half of the MLP: projection, bias and activation, as the epilogue of the matrix product and as one pass.

SwiGLU's gate and up projections are one product whose weight alternates their rows (`qwenvit.packing.pack_gate_up`),
so that both numbers of an output lie in one thread's registers.
"""

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

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _times_sigmoid(b_x, b_y, EXACT: tl.constexpr):
    """x · sigmoid(y)."""
    b_sum = 1.0 + tl.exp2(b_y * -LOG2_E)
    if EXACT:
        return tl.div_rn(b_x, b_sum)
    b_root = tl.rsqrt(b_sum)  # two instructions fewer than a division
    return b_x * (b_root * b_root)


@triton.jit
def _gelu(b_x):
    """Exact GELU in half of erf's instructions: max(x, 0) - a · Φ(-a), a = |x|.

    Φ(-a) = exp(-a² / 2) · t · P(t), t = 1 / (1 + 0.3 a), as in Abramowitz and Stegun 7.1.26; P, of degree 5, has the
    smallest largest relative error, 1.6e-6, so the negative tail is as right as the rest.
    """
    b_a = tl.minimum(tl.abs(b_x), 40.0, propagate_nan=tl.PropagateNan.ALL)  # Φ(-40) = 0 in fp32, and inf · 0 no NaN
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
    """The activation in fp32; EXACT to the last bits of fp32, else to those of 16-bit outputs and more."""
    if ACT == "gelu_tanh":  # 0.5 · (1 + tanh y) = sigmoid(2 y), y = √(2/π) · (x + 0.044715 x³)
        b_x = _times_sigmoid(b_x, b_x * (1.5957691216057308 + 0.07135481627260025 * b_x * b_x), EXACT)
    elif ACT == "quick_gelu":
        b_x = _times_sigmoid(b_x, 1.702 * b_x, EXACT)
    elif ACT == "gelu":
        if EXACT:
            b_x *= 0.5 + 0.5 * tl.erf(b_x * 0.7071067811865476)
        else:
            b_x = _gelu(b_x)
    else:
        tl.static_assert(ACT == "silu")
        b_x = _times_sigmoid(b_x, b_x, EXACT)
    return b_x


@triton.jit(do_not_specialize=["M"])
def _project_and_activate(
    x_ptr,  # shape (M, K): TMA descriptor or pointer
    w_ptr,  # shape (N, K): TMA descriptor seen as (1, 1, N, K), or pointer
    bias_ptr,  # shape (N,), or None
    out_ptr,  # shape (M, N), or (M, N / 2) where gated
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
        b_sum = accumulate(x_ptr, w_ptr, i_row, 0, 0, i_col, o_w, M, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        o_row = i_row + tl.arange(0, BLOCK_M)
        b_left, b_right = split_halves(b_sum)
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
    x_ptr,  # shape (M, N)
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
    gate_up_ptr,  # shape (M, N, 2)
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
    """Rows and columns of the output of one program of SwiGLU's pass."""

    rows: int
    cols: int
    num_warps: int


@dataclass(frozen=True)
class ActivationPass:
    """Elements of one program of an activation's pass."""

    block: int
    num_warps: int


GATE_PASS = GatePass(rows=2, cols=2048, num_warps=8)
"""Of nine shapes with 1024 to 4096 outputs: I = 3456, 21.7 µs at M = 4096 and 46.9 at 9216 (92 and 96 % of copy
bandwidth; all nine within 3 %)."""
ACTIVATION_PASS = ActivationPass(block=2048, num_warps=4)
"""N = 4304 at M = 4096 and 9216: GELU-tanh 18.9 and 39.8 µs, quick-GELU the same, exact GELU 19.0 and 40.0 (88 and
93 % of copy bandwidth; a copy takes 18.9 and 40.5). Blocks of 1024 to 8192 in 4 or 8 warps take up to 8 % longer;
blocks of 2 rows x 2048 columns 3 %. Exact GELU by erf took 25.2 and 53.0. In fp32, where erf stays, 37.0 and 80.1 (90
and 93 %)."""


def fused_is_faster(x: Tensor, weight: Tensor, act: str) -> bool:
    """Whether the fused kernel beats cuBLAS and the pass.

    SwiGLU does where rounds are 80 % full (8 of 8 cases, M = 1024 to 16384: 1.12 to 1.22 times) and not below (M = 256
    and 784: 0.92). The plain activations, whose pass costs less, want a single round to be 95 % full (0.97 and 0.99 at
    85 and 90 %, 1.18 at 97 %), and several to be 77 % full, or less in narrow towers, where the pass is more of the
    whole: 27 cases gain 1.00 to 1.24 times, and the 13 others, M = 256 to 2304, would gain 0.71 to 1.03 times. Exact
    GELU, of mergers, whose K is 4096 to 5120, never does: 0.51 to 1.01 times.
    """
    if act == "gelu":
        return False
    M, K = x.shape
    n_tiles = triton.cdiv(M, TMA_TILE.block_m) * triton.cdiv(weight.shape[0], TMA_TILE.block_n)
    tuned = tuning(capability(x.device)[0])
    if act == "swiglu":
        return wave_efficiency(n_tiles, x) >= tuned.swiglu_wave_efficiency
    if n_tiles <= TMA_TILE.programs * multiprocessors(x.device):
        return wave_efficiency(n_tiles, x) >= tuned.activation_single_wave_efficiency
    return wave_efficiency(n_tiles, x) >= min(tuned.activation_wave_efficiency, K / tuned.narrow_width)


def project_and_activate(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, gated: bool, tile: Tile | None = None
) -> Tensor:
    """The fused kernel: `[S, K]` -> `[S, N]`, or `[S, N / 2]` of an alternating gate and up weight."""
    M, K = x.shape
    N = weight.shape[0]
    out = x.new_empty((M, N // 2 if gated else N))
    if M == 0:
        return out
    tma = uses_tma(x, weight)
    tile = tile or (TMA_TILE if tma else POINTER_TILE)
    x_operand, w_operand = x, weight
    if tma:
        x_operand = descriptor_of(x, [M, K], [tile.block_m, tile.block_k])
        w_operand = descriptor_of(weight, [1, 1, N, K], [1, 1, tile.block_n, tile.block_k])
    n_tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    with torch.cuda.device_of(out):  # Triton launches on the current device, which need not be the tensor's
        _project_and_activate[(min(n_tiles, tile.programs * multiprocessors(out.device)),)](
            x_operand, w_operand, bias, out, M,
            N=N, K=K, ACT=act, GATED=gated,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=tile.band, TMA=tma,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def activation_(x: Tensor, act: str) -> None:
    """`act` of each element, in place; see `qwenvit.ops.activation_`."""
    M, N = x.shape
    if M == 0 or N == 0:
        return
    p = ACTIVATION_PASS
    with torch.cuda.device_of(x):
        _activate[(triton.cdiv(M * N, p.block),)](x, M, N=N, ACT=act, BLOCK=p.block, num_warps=p.num_warps)


def swiglu_pass(gate_up: Tensor) -> Tensor:
    """`[S, 2·I]` -> `[S, I]`; see `qwenvit.ops.swiglu_pass`."""
    M, N = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((M, N))
    if M == 0 or N == 0:
        return out
    p = GATE_PASS
    grid = (triton.cdiv(M, p.rows) * triton.cdiv(N, p.cols),)
    with torch.cuda.device_of(out):
        _swiglu[grid](gate_up, out, M, N=N, ACT="silu", BLOCK_M=p.rows, BLOCK_N=p.cols, num_warps=p.num_warps)
    return out


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """`act` of the projection; see `qwenvit.ops.linear_act`.

    cuBLASLt has an epilogue for tanh-GELU in 16 bits, which torch's own compiler uses as well. It beats both of ours:
    15.5, 30.3, 57.8 and 118.0 µs at 784, 1764, 3136 and 7056 x 4304 x 1152, where the better one takes 17.2, 32.8, 57.5
    and 124.6; 14.0, 25.9, 46.7 and 99.7 against 16.1, 29.4, 52.0 and 103.7 at 4096 x 1024 (H200, bf16).
    """
    aligned = weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0  # in 16 bits; otherwise it takes other ways
    if act == "gelu_tanh" and bias is not None and x.is_cuda and x.dtype != torch.float32 and aligned:
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    if fused_is_faster(x, weight, act):
        return project_and_activate(x, weight, bias, act, False)
    out = F.linear(x, weight, bias)
    activation_(out, act)
    return out


def swiglu(x: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor | None) -> Tensor:
    """silu(gate) · up; see `qwenvit.ops.swiglu`."""
    if fused_is_faster(x, gate_up_weight, "swiglu"):
        return project_and_activate(x, gate_up_weight, gate_up_bias, "silu", True)
    return swiglu_pass(F.linear(x, gate_up_weight, gate_up_bias))


def _empty(x: Tensor, columns: int) -> Tensor:
    return x.new_empty((x.shape[0], columns))


activation_op = register("activation_(Tensor(a!) x, str act) -> ()", activation_, lambda *_: None)
swiglu_pass_op = register("swiglu_pass(Tensor gate_up) -> Tensor", swiglu_pass, lambda x: _empty(x, x.shape[1] // 2))
linear_act_op = register(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor",
    linear_act,
    lambda x, weight, *_: _empty(x, weight.shape[0]),
)
swiglu_op = register(
    "swiglu(Tensor x, Tensor gate_up_weight, Tensor? gate_up_bias) -> Tensor",
    swiglu,
    lambda x, weight, *_: _empty(x, weight.shape[0] // 2),
)
