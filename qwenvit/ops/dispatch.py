"""Which implementation of an operation runs."""

import torch
from torch import Tensor


def use_triton(impl: str, tensor: Tensor) -> bool:
    """Whether `impl` means the Triton kernel for this tensor.

    Raises:
        ValueError: an unknown `impl`, or gradients asked of a kernel that has none.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'reference', got {impl!r}")
    triton = impl == "triton" or (impl == "auto" and tensor.is_cuda)
    if triton and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"impl: {impl!r} means Triton here, which gives no gradients; expected 'reference' or no_grad")
    return triton
