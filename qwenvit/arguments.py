"""What the encoder's arguments may be, and what it says when they are something else."""

from typing import Literal

import torch

Impl = Literal["auto", "triton", "reference"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_device(device: torch.device | str | None) -> torch.device:
    """The torch device meant by a `device` argument, and there to be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:  # what torch has for the purpose
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise ValueError(f"device: {str(device)!r} cannot be used on this machine: {reason}") from error
    return found


def check_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | None:
    """The torch dtype meant by a `dtype` argument; None for the checkpoint's own (`"auto"`)."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype: expected one of {[*DTYPES, 'auto']} or the torch dtype, got {dtype!r}")
    return found
