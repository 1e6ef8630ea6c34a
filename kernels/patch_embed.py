"""Patch embedding: pixel values times weights, plus bias and learned positions, written in the tower's order.

`_fused` does all of it in one GEMM: rows are read through the window index and converted as they come, positions are
interpolated in the epilogue. `_stage` (convert and reorder the rows) and `_add_positions` are the passes around a
cuBLAS GEMM where that is faster.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.norm import load_row, row_config, store_row


@triton.jit
def _source(i_out, index_ptr, UNIT: tl.constexpr):
    """The patch, in reading order, at a place (or a block of places) of the tower's order."""
    i_in = i_out.to(tl.int64)
    if index_ptr is not None:
        i_in = tl.load(index_ptr + i_in // UNIT) * UNIT + i_in % UNIT
    return i_in


@triton.jit
def _add_positions(
    x_ptr,  # shape (S, C); None for the positions alone
    table_ptr,  # shape (entries, C)
    taps_ptr,  # int64, entries of the table around each patch, shape (S, 4)
    tap_weights_ptr,  # fp32, shape (S, 4)
    index_ptr,  # int64, the token at each place of the output, shape (S / UNIT,); None for their own order
    y_ptr,  # shape (S, C)
    UNIT: tl.constexpr,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    i_in = _source(i_out, index_ptr, UNIT)
    b_main = tl.zeros([MAIN], tl.float32)
    b_tail = tl.zeros([TAIL], tl.float32)
    for i_tap in tl.static_range(4):
        i_entry = tl.load(taps_ptr + i_in * 4 + i_tap)
        tap_weight = tl.load(tap_weights_ptr + i_in * 4 + i_tap)
        b_tap_main, b_tap_tail = load_row(table_ptr + i_entry * C, C, MAIN, TAIL)
        b_main += tap_weight * b_tap_main
        b_tail += tap_weight * b_tap_tail
    if x_ptr is not None:
        b_x_main, b_x_tail = load_row(x_ptr + i_in * C, C, MAIN, TAIL)
        b_main += b_x_main
        b_tail += b_x_tail
    store_row(y_ptr + i_out * C, b_main, b_tail, C, MAIN, TAIL)


@triton.jit
def _stage(
    pixel_ptr,  # shape (S, K)
    index_ptr,  # int64, shape (S / UNIT,); None for the rows' own order
    y_ptr,  # shape (S, K), rows `stride_y` apart
    stride_y,
    UNIT: tl.constexpr,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    b_main, b_tail = load_row(pixel_ptr + _source(i_out, index_ptr, UNIT) * K, K, MAIN, TAIL)
    store_row(y_ptr + i_out * stride_y, b_main, b_tail, K, MAIN, TAIL)
