"""What the operations of `qwenvit.ops` accept, and what they say of anything else."""

import torch
from torch import Tensor

from qwenvit.arguments import DTYPES
from qwenvit.op_references import ACTIVATIONS


def check(fits: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError unless the named argument fits."""
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_like(
    tensor: Tensor, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Refuse a tensor that is not contiguous, of this shape, and of the dtype and on the device of another."""
    wanted = f"a contiguous {dtype or like.dtype} tensor {list(shape)} on {like.device}"
    fits = tensor.shape == shape and tensor.dtype == (dtype or like.dtype) and tensor.device == like.device
    got = f"{'' if tensor.is_contiguous() else 'non-contiguous '}{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    check(fits and tensor.is_contiguous(), name, wanted, got)


def check_matrix(tensor: Tensor, name: str) -> None:
    """Refuse anything but a contiguous matrix of a dtype that the kernels know."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"{name}: expected bfloat16, float16 or float32, got {tensor.dtype}")
    check(
        tensor.ndim == 2 and tensor.is_contiguous(),
        name,
        "a contiguous matrix",
        f"shape {list(tensor.shape)}, strides {list(tensor.stride())}",
    )


def check_projection(x: Tensor, x_name: str, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Refuse what `F.linear` would, and strides it would not."""
    check_matrix(x, x_name)
    check(weight.ndim == 2, f"{prefix}weight", "a matrix [out, in]", f"shape {list(weight.shape)}")
    check_like(weight, f"{prefix}weight", (weight.shape[0], x.shape[1]), x)
    if bias is not None:
        check_like(bias, f"{prefix}bias", (weight.shape[0],), x)


def check_rotation(width: int, name: str, cos: Tensor, sin: Tensor, num_heads: int, like: Tensor) -> None:
    """Refuse heads that do not divide packed Q, K and V, and angles that do not fit them."""
    check(
        num_heads > 0 and width > 0 and width % (12 * num_heads) == 0,
        name,
        f"columns of Q, K and V in {num_heads} heads of a multiple of 4 channels",
        width,
    )
    for angles, angles_name in ((cos, "cos"), (sin, "sin")):
        check_like(angles, angles_name, (like.shape[0], width // (3 * num_heads)), like, torch.float32)


def check_act(act: str) -> None:
    """Refuse an activation that is not known."""
    check(act in ACTIVATIONS, "act", f"one of {ACTIVATIONS}", repr(act))


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None, like: Tensor
) -> None:
    """Refuse what a kernel would misread: shape (None: any size, `...` sizes in front), dtype, device, layout."""
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
    """Refuse anything but a tensor of a dtype that the kernels know."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a float32, bfloat16 or float16 tensor {dims}, got {got}")
