"""The bytes of a tensor, in any dtype."""

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU; a contiguous one shares its memory with them. numpy has no bfloat16."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
