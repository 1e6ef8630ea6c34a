"""Copies of the first rows of several matrices."""

from collections.abc import Sequence

from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import check, check_matrix, check_tensor
from qwenvit.ops.dispatch import use_triton


def clone_rows(tensors: Sequence[Tensor], rows: int, impl: Impl = "auto") -> list[Tensor]:
    """Copy the first rows of several matrices to new memory, in one launch. I/O: reads and writes them once.

    Args:
        tensors: at least one matrix `[at least rows, columns]`, contiguous, float32, bfloat16 or float16, all of one
            dtype and on one device. Their numbers of columns may differ.
        rows: how many rows to copy.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        A new contiguous tensor `[rows, columns]` for each, bitwise the same.

    Raises:
        TypeError: a tensor has another type or dtype.
        ValueError: there is no tensor; shapes, devices or strides do not fit together; `rows` is negative or larger
            than a matrix; `"triton"` is asked for gradients.
    """
    check(len(tensors) > 0, "tensors", "at least one matrix", "none")
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        check_matrix(f"tensors[{i}]", tensor)
        check_tensor(f"tensors[{i}]", tensor, (None, None), first.dtype, first)
        check(0 <= rows <= len(tensor), "rows", f"0 to the {len(tensor)} rows of tensors[{i}]", rows)
    if not use_triton(impl, *tensors):
        return reference.clone_rows(tensors, rows)
    from qwenvit.kernels.clone_rows import clone_rows_op

    return clone_rows_op(tensors, rows)
