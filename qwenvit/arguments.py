"""What the encoder's arguments may be, and what it says when they are something else."""

from typing import Literal

import torch
from torch import Tensor

from qwenvit.config import VisionConfig

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


def check_pixel_values(pixel_values: Tensor, grid: Tensor, patches: int, config: VisionConfig) -> None:
    """Refuse anything but `[patches, C·T·P·P]` floats, as many as the grids stand for."""
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"pixel_values: expected a floating tensor [patches, {config.patch_dim}], got {got}")
    shape = list(pixel_values.shape)
    if len(shape) != 2 or shape[1] != config.patch_dim:
        hint = "; for whole images use encode(), which cuts them into patches" if len(shape) in (3, 4, 5) else ""
        raise ValueError(
            f"pixel_values: expected [patches, {config.patch_dim}] (channels x frames x height x width of a patch), "
            f"got {shape}{hint}"
        )
    if shape[0] != patches:
        more = f" and {len(grid) - 8} more" if len(grid) > 8 else ""
        raise ValueError(
            f"pixel_values: grid_thw {grid[:8].tolist()}{more} stands for {patches} patches, got {shape[0]}"
        )
