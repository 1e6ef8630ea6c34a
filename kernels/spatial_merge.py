"""Joining patches into tokens: a merger's norm, merge and reordering in one pass, and the merge of a feature map.

The patches of a token are neighbouring rows in the tower, so merging them is a change of shape alone: the norm writes
rows that the merger's first GEMM reads as fewer, longer ones. Reordering moves whole tokens: a program writes its own
row and reads the row that the index names. In a map `[T, H, W, C]` a token's patches are in `merge_size` different
rows; there a program copies (concat) or averages a piece of one row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.norm import launch_norm
from qwenvit.kernels.registration import register

CONCAT_BLOCK = 2048
AVERAGE_BLOCK = 512
"""Elements that a program of `_merge_concat` and of `_merge_average` writes, in four warps (TUNING.md)."""


@triton.jit(do_not_specialize=["H_OUT", "W_OUT"])
def _merge_concat(
    x_ptr,  # shape (T, H, W, C), unit stride in C, any other strides
    y_ptr,  # shape (T, H / SIZE, W / SIZE, SIZE * SIZE * C)
    H_OUT,
    W_OUT,
    stride_t,
    stride_h,
    stride_w,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0)  # row of the map, counted through all frames
    i_token_row = i_row // SIZE
    i_t = (i_token_row // H_OUT).to(tl.int64)
    i_h = (i_row - i_t * H_OUT * SIZE).to(tl.int64)
    o_flat = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # element of the row, below W * C
    m_flat = o_flat < W_OUT * SIZE * C
    o_in = (o_flat // C).to(tl.int64) * stride_w + o_flat % C
    b_x = tl.load(x_ptr + i_t * stride_t + i_h * stride_h + o_in, mask=m_flat)
    i_token = i_token_row.to(tl.int64) * W_OUT + o_flat // (SIZE * C)
    o_out = (i_token * SIZE + i_row % SIZE) * (SIZE * C) + o_flat % (SIZE * C)
    tl.store(y_ptr + o_out, b_x, mask=m_flat)


@triton.jit(do_not_specialize=["H_OUT", "W_OUT"])
def _merge_average(
    x_ptr,  # shape (T, H, W, C), unit stride in C, any other strides
    y_ptr,  # shape (T, H / SIZE, W / SIZE, C)
    H_OUT,
    W_OUT,
    stride_t,
    stride_h,
    stride_w,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)  # row of the output, counted through all frames
    i_t = i_row // H_OUT
    i_h = (i_row - i_t * H_OUT) * SIZE
    o_flat = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # element of the output row, below W_OUT * C
    m_flat = o_flat < W_OUT * C
    p_x = x_ptr + i_t * stride_t + i_h * stride_h + (o_flat // C * SIZE).to(tl.int64) * stride_w + o_flat % C
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_y in tl.static_range(SIZE):
        for i_x in tl.static_range(SIZE):
            b_sum += tl.load(p_x + i_y * stride_h + i_x * stride_w, mask=m_flat, other=0).to(tl.float32)
    tl.store(y_ptr + i_row * W_OUT * C + o_flat, tl.div_rn(b_sum, SIZE * SIZE * 1.0), mask=m_flat)


def _empty_tokens(x: Tensor, merge_unit: int) -> Tensor:
    return x.new_empty((x.shape[0] // merge_unit, merge_unit * x.shape[1]))


def _empty_map(x: Tensor, mode: str, merge_size: int) -> Tensor:
    T, H, W, C = x.shape
    return x.new_empty((T, H // merge_size, W // merge_size, merge_size**2 * C if mode == "concat" else C))


def merge_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    restore_index: Tensor | None,
    kind: str,
    eps: float,
    norm_merged: bool,
    merge_unit: int,
) -> Tensor:
    """Return the input of a merger's first GEMM; see `qwenvit.ops.merge_norm`.

    I/O: reads x and 8 bytes of restore_index a token, writes as many bytes as x has. About 6 FLOPs an element.
    """
    y = _empty_tokens(x, merge_unit)
    launch_norm(x, None, weight, bias, None, restore_index, kind, eps, y, None, 1 if norm_merged else merge_unit)
    return y


def spatial_merge(x: Tensor, mode: str, merge_size: int) -> Tensor:
    """Merge blocks of a map `[T, H, W, C]`; see `qwenvit.ops.spatial_merge`.

    I/O: reads x; writes as many bytes (concat), or 1 / merge_size² of them (average).
    """
    T, H, W, C = x.shape
    y = _empty_map(x, mode, merge_size)
    _, H_out, W_out, _ = y.shape
    if mode == "concat":
        kernel, rows, row_length, block = _merge_concat, T * H, W * C, CONCAT_BLOCK
    else:
        kernel, rows, row_length, block = _merge_average, T * H_out, W_out * C, AVERAGE_BLOCK
    if y.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensor's
            kernel[(rows, triton.cdiv(row_length, block))](
                x, y, H_out, W_out, *x.stride()[:3], SIZE=merge_size, C=C, BLOCK=block, **COMPILE_OPTIONS
            )
    return y


merge_norm_op = register(
    "merge_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? restore_index, str kind, float eps, bool norm_merged, "
    "int merge_unit) -> Tensor",
    merge_norm,
    lambda x, *arguments: _empty_tokens(x, arguments[-1]),
)
spatial_merge_op = register("spatial_merge(Tensor x, str mode, int merge_size) -> Tensor", spatial_merge, _empty_map)
