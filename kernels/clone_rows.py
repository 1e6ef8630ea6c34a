"""Copies of the first rows of several matrices, in one launch.

`torch._foreach_copy_` takes one launch too, but gives each program 2¹⁶ elements: the outputs of a small image then
occupy a tenth of a GPU, and copying them takes as long as one program takes for its share.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.registration import register

BLOCK_BYTES = 8192
"""Bytes that a program copies, in four warps: four loads of 16 bytes a thread."""


@triton.jit(do_not_specialize=["rows"])
def _clone_rows(
    x_ptrs,  # a tuple of pointers, shapes (at least rows, WIDTHS[i])
    y_ptrs,  # a tuple of pointers, shapes (rows, WIDTHS[i])
    rows,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_matrix = tl.program_id(1)
    o_first = tl.program_id(0).to(tl.int64) * BLOCK
    o_block = tl.arange(0, BLOCK)
    for i in tl.static_range(len(WIDTHS)):
        if i_matrix == i:
            m_block = o_block < rows.to(tl.int64) * WIDTHS[i] - o_first
            b_x = tl.load(x_ptrs[i] + o_first + o_block, mask=m_block)
            tl.store(y_ptrs[i] + o_first + o_block, b_x, mask=m_block)


def _empty_rows(tensors: list[Tensor], rows: int) -> list[Tensor]:
    return [x.new_empty((rows, x.shape[1])) for x in tensors]


def clone_rows(tensors: list[Tensor], rows: int) -> list[Tensor]:
    """Copy the first rows of each matrix; see `qwenvit.ops.clone_rows`.

    I/O: reads and writes the bytes of the rows once. No FLOPs.
    """
    copies = _empty_rows(tensors, rows)
    widths = tuple(x.shape[1] for x in tensors)
    if rows * max(widths):
        block = BLOCK_BYTES // tensors[0].element_size()
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device, which need not be the tensors'
            _clone_rows[(triton.cdiv(rows * max(widths), block), len(tensors))](
                tuple(tensors), tuple(copies), rows, WIDTHS=widths, BLOCK=block, **COMPILE_OPTIONS
            )
    return copies


clone_rows_op = register("clone_rows(Tensor[] tensors, int rows) -> Tensor[]", clone_rows, _empty_rows)
