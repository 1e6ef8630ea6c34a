"""Which implementation of an operation runs."""

from torch import Tensor


def use_triton(impl: str, tensor: Tensor) -> bool:
    """Whether `impl` means the Triton kernel for this tensor; ValueError for an unknown `impl`."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'reference', got {impl!r}")
    return impl == "triton" or (impl == "auto" and tensor.is_cuda)
