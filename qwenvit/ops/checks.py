"""Checks of the arguments of `qwenvit.ops`: each raises TypeError or ValueError with the argument's name."""

import torch
from torch import Tensor

from qwenvit.ops.packing import packed_width
from qwenvit.ops.reference import ACTIVATIONS

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the kernels support."""


def check(fits: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError "{name}: expected …, got …" unless `fits`."""
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_matrix(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a contiguous matrix `[rows, columns]` in one of the `FLOATING` dtypes."""
    check_floating(name, tensor, "[rows, columns]")
    check_tensor(name, tensor, (None, None), None, tensor)


def check_projection(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raise unless x `[S, C]`, weight `[N, C]` and bias `[N]` or None agree in dtype and device and are contiguous."""
    check_matrix(name, x)
    check_tensor(f"{prefix}weight", weight, (None, x.shape[1]), x.dtype, x)
    if bias is not None:
        check_tensor(f"{prefix}bias", bias, (weight.shape[0],), x.dtype, x)


def check_rotation(name: str, width: int, cos: Tensor, sin: Tensor, num_heads: int, like: Tensor) -> None:
    """Raise unless `width` columns are Q, K and V in `num_heads` heads, and `cos` and `sin` fit them.

    Args:
        name: the argument that has these columns.
        width: 3·H·D, or 2·H·72 + H·80.
        cos: `[S, D]` fp32.
        sin: `[S, D]` fp32.
        num_heads: H.
        like: a tensor with S rows on the expected device.
    """
    if num_heads > 0 and width == packed_width(num_heads, 72):
        head_dim = 72
    else:
        check(
            num_heads > 0 and width > 0 and width % (12 * num_heads) == 0,
            name,
            f"columns of Q, K and V in {num_heads} heads of a multiple of 4 channels",
            width,
        )
        head_dim = width // (3 * num_heads)
    for angles_name, angles in (("cos", cos), ("sin", sin)):
        check_tensor(angles_name, angles, (like.shape[0], head_dim), torch.float32, like)


def check_act(act: str) -> None:
    """Raise ValueError unless `act` is one of `ACTIVATIONS`."""
    check(act in ACTIVATIONS, "act", f"one of {ACTIVATIONS}", repr(act))


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None, like: Tensor
) -> None:
    """Raise unless `tensor` is contiguous, on the device of `like`, and of this shape and dtype.

    None in `shape` means any size, a `dtype` of None for any dtype.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want not in (None, size) for want, size in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(got)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous, got strides {tensor.stride()} for shape {list(got)}")


def check_floating(name: str, tensor: Tensor, dims: str) -> None:
    """Raise TypeError unless `tensor` is a tensor in one of the `FLOATING` dtypes; `dims` is its shape in words."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a float32, bfloat16 or float16 tensor {dims}, got {got}")
