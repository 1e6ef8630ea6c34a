"""The choice between the Triton kernel and the reference."""

import torch
from torch import Tensor


def use_triton(impl: str, tensor: Tensor) -> bool:
    """Return whether `impl` selects the Triton kernel for an operation on `tensor`.

    Raises:
        ValueError: `impl` is unknown, or it selects Triton while autograd would record the operation.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'reference', got {impl!r}")
    triton = impl == "triton" or (impl == "auto" and tensor.is_cuda)
    if triton and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"impl: {impl!r} means Triton here, which gives no gradients; expected 'reference' or no_grad")
    return triton
