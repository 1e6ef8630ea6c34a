"""Which implementation of an operation runs, and on which device."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def use_triton(impl: str, tensor: Tensor) -> bool:
    """Whether `impl` means the Triton kernel for this tensor; ValueError for an unknown `impl`."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'reference', got {impl!r}")
    return impl == "triton" or (impl == "auto" and tensor.is_cuda)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
