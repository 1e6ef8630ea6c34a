"""The choice between the Triton kernel and the reference."""

import torch
from torch import Tensor


def use_triton(impl: str, *tensors: Tensor | None) -> bool:
    """Return whether `impl` selects the Triton kernel for an operation on tensors of one device, the first not None.

    Raises:
        ValueError: `impl` is unknown, or it selects Triton while autograd would record the operation.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'reference', got {impl!r}")
    triton = impl == "triton" or (impl == "auto" and tensors[0] is not None and tensors[0].is_cuda)
    if triton and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(f"impl: {impl!r} means Triton here, which gives no gradients; expected 'reference' or no_grad")
    return triton
