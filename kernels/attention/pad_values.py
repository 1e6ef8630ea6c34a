"""Channels of ones beside the values of head_dim 72: attention on Hopper adds up rows of P with them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.attention.rotate import stride_unit, with_small_strides
from qwenvit.kernels.compile_options import COMPILE_OPTIONS

PADDED = 16
"""Channels of the result."""
ROWS, NUM_WARPS = 64, 4
"""Rows of all heads that a program copies: a vector of 16 bytes for each thread."""


@triton.jit(do_not_specialize=["S"])
def _pad_with_ones(
    v_ptr,  # shape (S, H, C)
    out_ptr,  # shape (S, H, PADDED)
    stride_s,  # this and the next in units of STRIDE_UNIT elements
    stride_h,
    S,
    H: tl.constexpr,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_channel = tl.arange(0, PADDED)
    m_row = o_row < S.to(tl.int64) * H
    o_v = (o_row // H * stride_s + o_row % H * stride_h) * STRIDE_UNIT
    m_v = m_row[:, None] & (o_channel < C)[None, :]
    b_v = tl.load(v_ptr + (o_v[:, None] + o_channel[None, :]), mask=m_v, other=1.0)
    tl.store(out_ptr + (o_row[:, None] * PADDED + o_channel[None, :]), b_v, mask=m_row[:, None])


def pad_with_ones(v: Tensor) -> Tensor:
    """Copy the last channels of values, `[S, H, C]` in 16 bits, and fill up to 16 with ones: `[S, H, 16]`.

    The last stride must be 1. One launch, where `torch.nn.functional.pad` takes two and reads element by element. I/O:
    reads 2·S·H·C bytes and writes 32·S·H.
    """
    S, H, C = v.shape
    v = with_small_strides(v)
    out = v.new_empty(S, H, PADDED)
    if out.numel():
        unit = stride_unit(v)
        with torch.cuda.device_of(v):  # Triton launches on the current device, which need not be the tensor's
            _pad_with_ones[(triton.cdiv(S * H, ROWS),)](
                v, out, v.stride(0) // unit, v.stride(1) // unit, S,
                H=H, C=C, PADDED=PADDED, STRIDE_UNIT=unit, ROWS=ROWS, num_warps=NUM_WARPS, **COMPILE_OPTIONS,
            )  # fmt: skip
    return out
