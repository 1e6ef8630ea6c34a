"""Patch embedding: pixel values times weights, plus bias and learned positions, written in the tower's order.

`_convert_rows` writes the pixel values in the tower's order and in the weight's dtype, before cuBLAS reads them. With
learned positions, `_add_position_rows` writes them (plus the bias) in that order, and the product adds to them.
Reordering moves whole tokens of MERGE_UNIT patches: `restore_ptr` has each token's place.

Interpolating positions or converting pixel values inside the product was slower than separate passes (TUNING.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.gemm.cublas import add_linear_, linear
from qwenvit.kernels.norm import load_row, row_config, store_row
from qwenvit.kernels.registration import register

PASS_WARPS = 1
"""Warps of a program of `_add_position_rows` and `_convert_rows`, which processes one row (TUNING.md)."""


@triton.jit
def _output_row(
    i_in,
    restore_ptr,  # int64, shape (S / MERGE_UNIT,): place of each token in the tower's order; None for the order given
    MERGE_UNIT: tl.constexpr,
):
    """Return the output row of a patch, or of a block of patches."""
    i_out = i_in.to(tl.int64)
    if restore_ptr is not None:
        i_out = tl.load(restore_ptr + i_out // MERGE_UNIT) * MERGE_UNIT + i_out % MERGE_UNIT
    return i_out


@triton.jit
def _add_position_rows(
    x_ptr,  # shape (S, C); None writes the positions alone
    table_ptr,  # shape (entries, C)
    taps_ptr,  # int64, shape (S, 4): table entries around each patch
    tap_weights_ptr,  # fp32, shape (S, 4): bilinear weights of those entries
    bias_ptr,  # shape (C,), or None
    restore_ptr,  # int64, shape (S / MERGE_UNIT,): place of each token; None for the order given
    y_ptr,  # shape (S, C)
    MERGE_UNIT: tl.constexpr,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_in = tl.program_id(0).to(tl.int64)
    if x_ptr is not None:
        b_x_main, b_x_tail = load_row(x_ptr + i_in * C, C, MAIN, TAIL)
    b_main = tl.zeros([MAIN], tl.float32)
    b_tail = tl.zeros([TAIL], tl.float32)
    for i_tap in tl.static_range(4):
        i_entry = tl.load(taps_ptr + i_in * 4 + i_tap)
        tap_weight = tl.load(tap_weights_ptr + i_in * 4 + i_tap)
        b_tap_main, b_tap_tail = load_row(table_ptr + i_entry * C, C, MAIN, TAIL)
        b_main += tap_weight * b_tap_main
        b_tail += tap_weight * b_tap_tail
    if bias_ptr is not None:
        b_bias_main, b_bias_tail = load_row(bias_ptr, C, MAIN, TAIL)
        b_main += b_bias_main
        b_tail += b_bias_tail
    if x_ptr is not None:
        b_main += b_x_main
        b_tail += b_x_tail
    store_row(y_ptr + _output_row(i_in, restore_ptr, MERGE_UNIT) * C, b_main, b_tail, C, MAIN, TAIL)


@triton.jit
def _convert_rows(
    pixel_ptr,  # shape (S, K)
    restore_ptr,  # int64, shape (S / MERGE_UNIT,): place of each token; None for the order given
    y_ptr,  # shape (S, K), row stride `stride_y`
    stride_y,
    MERGE_UNIT: tl.constexpr,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_in = tl.program_id(0).to(tl.int64)
    b_main, b_tail = load_row(pixel_ptr + i_in * K, K, MAIN, TAIL)
    store_row(y_ptr + _output_row(i_in, restore_ptr, MERGE_UNIT) * stride_y, b_main, b_tail, K, MAIN, TAIL)


def _convert_and_reorder(
    pixel_values: Tensor, restore_index: Tensor | None, merge_unit: int, dtype: torch.dtype
) -> Tensor:
    """Return `[S, K]` pixel values in another dtype and order.

    Rows start at multiples of 128 bytes, a cache line. Nothing reads the padding between them.
    """
    S, K = pixel_values.shape
    elements_per_line = 128 // dtype.itemsize
    rows = pixel_values.new_empty((S, triton.cdiv(K, elements_per_line) * elements_per_line), dtype=dtype)
    config = row_config(K, has_residual=False)
    if S:
        with torch.cuda.device_of(rows):
            _convert_rows[(S,)](
                pixel_values, restore_index, rows, rows.stride(0), MERGE_UNIT=merge_unit, K=K, MAIN=config.main,
                TAIL=config.tail, num_warps=PASS_WARPS, **COMPILE_OPTIONS,
            )  # fmt: skip
    return rows[:, :K]


def _launch_add_positions(
    y: Tensor,
    x: Tensor | None,
    table: Tensor,
    taps: Tensor,
    tap_weights: Tensor,
    bias: Tensor | None,
    restore_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    """Write positions, plus x and bias if there are any, to `y` `[S, C]`, and return it."""
    S, C = y.shape
    config = row_config(C, has_residual=x is not None)
    if S:
        with torch.cuda.device_of(y):
            _add_position_rows[(S,)](
                x, table, taps, tap_weights, bias, restore_index, y, MERGE_UNIT=merge_unit, C=C, MAIN=config.main,
                TAIL=config.tail, num_warps=PASS_WARPS, **COMPILE_OPTIONS,
            )  # fmt: skip
    return y


def interpolate_positions(table: Tensor, taps: Tensor, tap_weights: Tensor) -> Tensor:
    """Return the learned positions of patches; see `qwenvit.ops.interpolate_positions`.

    I/O: reads table, taps and tap_weights, writes y. 8 FLOPs an element.
    """
    y = table.new_empty((taps.shape[0], table.shape[1]))
    return _launch_add_positions(y, None, table, taps, tap_weights, None, None, 1)


def add_positions(
    x: Tensor, table: Tensor, taps: Tensor, tap_weights: Tensor, restore_index: Tensor | None, merge_unit: int
) -> Tensor:
    """Return patches plus their learned positions; see `qwenvit.ops.add_positions`.

    I/O: reads x, table, taps and tap_weights, writes y. 9 FLOPs an element.
    """
    return _launch_add_positions(torch.empty_like(x), x, table, taps, tap_weights, None, restore_index, merge_unit)


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    taps: Tensor | None,
    tap_weights: Tensor | None,
    restore_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    """Return embedded patches; see `qwenvit.ops.patch_embed`.

    I/O: reads pixel_values, weight and table, writes y. Writes and reads once more: learned positions, and rows that
    are converted or reordered. 2·S·K·N FLOPs.
    """
    rows = pixel_values
    if rows.dtype != weight.dtype or restore_index is not None:
        rows = _convert_and_reorder(rows, restore_index, merge_unit, weight.dtype)
    if table is None or taps is None or tap_weights is None:
        return linear(rows, weight, bias)
    y = weight.new_empty((len(rows), len(weight)))
    _launch_add_positions(y, None, table, taps, tap_weights, bias, restore_index, merge_unit)
    return add_linear_(y, rows, weight)


interpolate_positions_op = register(
    "interpolate_positions(Tensor table, Tensor taps, Tensor tap_weights) -> Tensor",
    interpolate_positions,
    lambda table, taps, *_: table.new_empty((taps.shape[0], table.shape[1])),
)
add_positions_op = register(
    "add_positions(Tensor x, Tensor table, Tensor taps, Tensor tap_weights, Tensor? restore_index, int merge_unit) "
    "-> Tensor",
    add_positions,
    lambda x, *_: torch.empty_like(x),
)
patch_embed_op = register(
    "patch_embed(Tensor pixel_values, Tensor weight, Tensor? bias, Tensor? table, Tensor? taps, Tensor? tap_weights, "
    "Tensor? restore_index, int merge_unit) -> Tensor",
    patch_embed,
    lambda pixel_values, weight, *_: weight.new_empty((pixel_values.shape[0], weight.shape[0])),
)
