"""RMSNorm and LayerNorm of rows, alone or of the sum of two tensors: each element is read once and written once.

A row lies in registers as two blocks, the largest power of two below its width and what remains: every width in use is
a sum of two powers of two (1280 = 1024 + 256, 1152 = 1024 + 128, 768 = 512 + 256, 5120 = 4096 + 1024), so no lane
idles, as 768 of 2048 would under one masked block. Statistics are fp32, of centred values for LayerNorm. A sum is
normalised before it is rounded to be stored, so y has one rounding, not two.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.registration import register


@triton.jit
def load_row(
    p_row,  # pointer to the first of C elements
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A row in fp32, as two blocks; zeros past its end."""
    o_main = tl.arange(0, MAIN)
    o_tail = MAIN + tl.arange(0, TAIL)
    b_main = tl.load(p_row + o_main, mask=o_main < C, other=0).to(tl.float32)
    b_tail = tl.load(p_row + o_tail, mask=o_tail < C, other=0).to(tl.float32)
    return b_main, b_tail


@triton.jit
def store_row(p_row, b_main, b_tail, C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The inverse of `load_row`, rounded to the pointer's dtype."""
    o_main = tl.arange(0, MAIN)
    o_tail = MAIN + tl.arange(0, TAIL)
    tl.store(p_row + o_main, b_main, mask=o_main < C)
    tl.store(p_row + o_tail, b_tail, mask=o_tail < C)


@triton.jit
def _standardize(b_main, b_tail, eps, CENTERED: tl.constexpr, C: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """A row divided by its root mean square, or (CENTERED) less its mean and divided by its deviation."""
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
    residual_ptr,  # shape (rows, C); None where nothing is added
    weight_ptr,  # shape (C,)
    bias_ptr,  # shape (C,); None where there is none
    shift_ptr,  # added to the sum as it is stored, shape (C,); None where nothing is
    index_ptr,  # int64, shape (rows / UNIT,): the group of UNIT rows to read for each written; None for their own order
    y_ptr,  # shape (rows, C)
    total_ptr,  # x + residual, shape (rows, C); None where nothing is added
    eps,
    CENTERED: tl.constexpr,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One row: LayerNorm (CENTERED) or RMSNorm. Every load is on its way before the first sum waits for one."""
    i_out = tl.program_id(0).to(tl.int64)
    i_in = i_out
    if index_ptr is not None:
        i_in = tl.load(index_ptr + i_out // UNIT) * UNIT + i_out % UNIT
    b_main, b_tail = load_row(x_ptr + i_in * C, C, MAIN, TAIL)
    if residual_ptr is not None:
        b_residual_main, b_residual_tail = load_row(residual_ptr + i_in * C, C, MAIN, TAIL)
    b_weight_main, b_weight_tail = load_row(weight_ptr, C, MAIN, TAIL)
    if bias_ptr is not None:
        b_bias_main, b_bias_tail = load_row(bias_ptr, C, MAIN, TAIL)
    if residual_ptr is not None:
        b_main += b_residual_main
        b_tail += b_residual_tail
        tl.debug_barrier()  # the sum may take the residual's place, of which two warps may read the same element
        b_total_main = b_main
        b_total_tail = b_tail
        if shift_ptr is not None:
            b_shift_main, b_shift_tail = load_row(shift_ptr, C, MAIN, TAIL)
            b_total_main += b_shift_main
            b_total_tail += b_shift_tail
        store_row(total_ptr + i_in * C, b_total_main, b_total_tail, C, MAIN, TAIL)
    b_main, b_tail = _standardize(b_main, b_tail, eps, CENTERED, C, MAIN, TAIL)
    b_main *= b_weight_main
    b_tail *= b_weight_tail
    if bias_ptr is not None:
        b_main += b_bias_main
        b_tail += b_bias_tail
    store_row(y_ptr + i_out * C, b_main, b_tail, C, MAIN, TAIL)


@dataclass(frozen=True)
class RowConfig:
    """How a row is split, and among how many warps."""

    main: int
    tail: int
    num_warps: int


def row_config(C: int, adds: bool) -> RowConfig:
    """The split of a row of C elements; the same for any number of rows, and so the same sums.

    Either norm with a residual takes the same time within 6 % in one, two or four warps (H200, bf16, 4096 rows and
    more; times here are of a run of their own). LayerNorm alone takes, in one, two and four warps, 15.2, 14.1 and 16.9
    µs at 9216 x 1280; 7.0, 7.4 and 8.7 at 4096 x 1152; 6.3, 6.7 and 7.6 at 4096 x 1024; 9.4, 10.0 and 13.2 at
    9216 x 768; but 20.0, 15.8 and 13.1 at 1764 x 4608. A copy of the first four takes 13.3, 6.4, 5.9 and 8.7. Blocks of
    rows, and resident programs that load the weights once, were slower by 5 to 38 % at 9216 x 1280.
    """
    main = max(triton.next_power_of_2(C) // 2, 1)
    num_warps = 4 if C > 2048 else 1 if C <= 1152 and not adds else 2
    return RowConfig(main, triton.next_power_of_2(max(C - main, 1)), num_warps)


def launch_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, shift: Tensor | None,
    index: Tensor | None, kind: str, eps: float, y: Tensor, total: Tensor | None, unit: int = 1,
) -> None:  # fmt: skip
    """Normalise rows of as many elements as `weight` has, read in groups of `unit` as `index` says, into `y`."""
    C = weight.shape[0]
    config = row_config(C, residual is not None)
    if C and (rows := x.numel() // C):
        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensor's
            norm_rows[(rows,)](
                x, residual, weight, bias, shift, index, y, total, eps, CENTERED=kind == "layer", UNIT=unit, C=C,
                MAIN=config.main, TAIL=config.tail, num_warps=config.num_warps,
            )  # fmt: skip


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """The norm of each row; see `qwenvit.ops.norm`.

    I/O: reads x, writes y. About 6 FLOPs an element.
    """
    y = torch.empty_like(x)
    launch_rows(x, None, weight, bias, None, None, kind, eps, y, None)
    return y


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of each row of x + residual, and that sum, shifted; see `qwenvit.ops.add_norm`.

    I/O: reads x and residual, writes y and the sum. About 7 FLOPs an element.
    """
    y, total = torch.empty_like(x), torch.empty_like(x)
    launch_rows(x, residual, weight, bias, shift, None, kind, eps, y, total)
    return y, total


def add_norm_inplace(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, kind: str, eps: float
) -> Tensor:
    """`add_norm` whose sum takes the residual's place; see `qwenvit.ops.add_norm_`."""
    y = torch.empty_like(x)
    launch_rows(x, residual, weight, bias, shift, None, kind, eps, y, residual)
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
