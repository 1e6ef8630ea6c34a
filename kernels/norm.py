"""RMSNorm and LayerNorm of rows, or of the sum of two tensors: each element is read once and written once.

One program keeps a row in registers as two blocks: the largest power of two below the row's width, and the remainder.
Every width in use is a sum of two powers of two (1280 = 1024 + 256, 1152 = 1024 + 128, 768 = 512 + 256), so no lane
idles, as it would in one masked block of 2048. Statistics are fp32, LayerNorm's variance of centred values. The norm
of a sum starts from the unrounded sum, so y is rounded once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.registration import register


@triton.jit
def load_row(
    p_row,  # pointer to the row, shape (C,)
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Load a row as fp32 blocks of MAIN and TAIL elements, zero past its end."""
    o_main = tl.arange(0, MAIN)
    o_tail = MAIN + tl.arange(0, TAIL)
    b_main = tl.load(p_row + o_main, mask=o_main < C, other=0).to(tl.float32)
    b_tail = tl.load(p_row + o_tail, mask=o_tail < C, other=0).to(tl.float32)
    return b_main, b_tail


@triton.jit
def store_row(
    p_row,  # pointer to the row, shape (C,)
    b_main,
    b_tail,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Store a row's blocks of MAIN and TAIL elements, rounded to the pointer's dtype."""
    o_main = tl.arange(0, MAIN)
    o_tail = MAIN + tl.arange(0, TAIL)
    tl.store(p_row + o_main, b_main, mask=o_main < C)
    tl.store(p_row + o_tail, b_tail, mask=o_tail < C)


@triton.jit
def _normalise(b_main, b_tail, eps, CENTERED: tl.constexpr, C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Divide a row by its root mean square; if CENTERED, subtract its mean first."""
    if CENTERED:
        mean = (tl.sum(b_main, 0) + tl.sum(b_tail, 0)) * (1.0 / C)
        b_main = tl.where(tl.arange(0, MAIN) < C, b_main - mean, 0.0)
        b_tail = tl.where(MAIN + tl.arange(0, TAIL) < C, b_tail - mean, 0.0)
    square = tl.sum(b_main * b_main, 0) + tl.sum(b_tail * b_tail, 0)
    scale = tl.rsqrt(square * (1.0 / C) + eps)
    return b_main * scale, b_tail * scale


@triton.jit
def norm_rows(
    x_ptr,  # shape (rows, C)
    residual_ptr,  # shape (rows, C); None for the norm of x alone
    weight_ptr,  # shape (C,)
    bias_ptr,  # shape (C,), or None
    shift_ptr,  # shape (C,), added to the stored sum but not to the normalised one; or None
    index_ptr,  # int64, shape (rows / GROUP_ROWS,): group of rows to read for each group written; None: the same group
    y_ptr,  # shape (rows, C)
    total_ptr,  # x + residual + shift, shape (rows, C); None for the norm of x alone
    eps,
    CENTERED: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Write one row of LayerNorm (CENTERED) or RMSNorm. All loads are issued before the first sum waits for one."""
    i_out = tl.program_id(0).to(tl.int64)
    i_in = i_out
    if index_ptr is not None:
        i_in = tl.load(index_ptr + i_out // GROUP_ROWS) * GROUP_ROWS + i_out % GROUP_ROWS
    b_main, b_tail = load_row(x_ptr + i_in * C, C, MAIN, TAIL)
    if residual_ptr is not None:
        b_residual_main, b_residual_tail = load_row(residual_ptr + i_in * C, C, MAIN, TAIL)
    b_weight_main, b_weight_tail = load_row(weight_ptr, C, MAIN, TAIL)
    if bias_ptr is not None:
        b_bias_main, b_bias_tail = load_row(bias_ptr, C, MAIN, TAIL)
    if residual_ptr is not None:
        b_main += b_residual_main
        b_tail += b_residual_tail
        tl.debug_barrier()  # total may overwrite the residual, and two warps may read the same element of it
        b_total_main = b_main
        b_total_tail = b_tail
        if shift_ptr is not None:
            b_shift_main, b_shift_tail = load_row(shift_ptr, C, MAIN, TAIL)
            b_total_main += b_shift_main
            b_total_tail += b_shift_tail
        store_row(total_ptr + i_in * C, b_total_main, b_total_tail, C, MAIN, TAIL)
    b_main, b_tail = _normalise(b_main, b_tail, eps, CENTERED, C, MAIN, TAIL)
    b_main *= b_weight_main
    b_tail *= b_weight_tail
    if bias_ptr is not None:
        b_main += b_bias_main
        b_tail += b_bias_tail
    store_row(y_ptr + i_out * C, b_main, b_tail, C, MAIN, TAIL)


@dataclass(frozen=True)
class RowConfig:
    """Block sizes of a row, and warps of the program that processes it."""

    main: int
    tail: int
    num_warps: int


def row_config(C: int, has_residual: bool) -> RowConfig:
    """Return the launch config for rows of C elements (TUNING.md).

    The number of rows plays no part, so a row is summed in the same order in every batch.
    """
    main = max(triton.next_power_of_2(C) // 2, 1)
    num_warps = 4 if C > 2048 else 1 if C <= 1152 and not has_residual else 2
    return RowConfig(main, triton.next_power_of_2(max(C - main, 1)), num_warps)


def launch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, shift: Tensor | None,
    index: Tensor | None, kind: str, eps: float, y: Tensor, total: Tensor | None, group_rows: int = 1,
) -> None:  # fmt: skip
    """Write the norms of rows of `len(weight)` elements to `y`.

    `index` names the group of `group_rows` input rows that each group of output rows is computed from.
    """
    C = weight.shape[0]
    config = row_config(C, residual is not None)
    if C and (rows := x.numel() // C):
        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensor's
            norm_rows[(rows,)](
                x, residual, weight, bias, shift, index, y, total, eps, CENTERED=kind == "layer",
                GROUP_ROWS=group_rows, C=C, MAIN=config.main, TAIL=config.tail, num_warps=config.num_warps,
                **COMPILE_OPTIONS,
            )  # fmt: skip


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """Return the norm of each row; see `qwenvit.ops.norm`.

    I/O: reads x, writes y. About 6 FLOPs an element.
    """
    y = torch.empty_like(x)
    launch_norm(x, None, weight, bias, None, None, kind, eps, y, None)
    return y


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the norm of each row of x + residual, and x + residual + shift; see `qwenvit.ops.add_norm`.

    I/O: reads x and residual, writes y and the sum. About 7 FLOPs an element.
    """
    y, total = torch.empty_like(x), torch.empty_like(x)
    launch_norm(x, residual, weight, bias, shift, None, kind, eps, y, total)
    return y, total


def add_norm_inplace(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, kind: str, eps: float
) -> Tensor:
    """Return the norm of each row of x + residual; overwrite residual with the sum. See `qwenvit.ops.add_norm_`.

    I/O: reads x and residual, writes y and the residual. About 7 FLOPs an element.
    """
    y = torch.empty_like(x)
    launch_norm(x, residual, weight, bias, shift, None, kind, eps, y, residual)
    return y


norm_op = register(
    "norm(Tensor x, Tensor weight, Tensor? bias, str kind, float eps) -> Tensor",
    norm,
    lambda x, *_: torch.empty_like(x),
)
add_norm_op = register(
    "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? shift, str kind, float eps) "
    "-> (Tensor, Tensor)",
    add_norm,
    lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
)
add_norm_inplace_op = register(
    "add_norm_(Tensor x, Tensor(a!) residual, Tensor weight, Tensor? bias, Tensor? shift, str kind, float eps) "
    "-> Tensor",
    add_norm_inplace,
    lambda x, *_: torch.empty_like(x),
)
