"""RMSNorm and LayerNorm, alone or fused with the addition of a residual."""

from typing import Literal

from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import NORM_EPS
from qwenvit.ops import reference
from qwenvit.ops.checks import check_floating, check_tensor
from qwenvit.ops.dispatch import use_triton

NormKind = Literal["rms", "layer"]


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, width: int) -> None:
    """Raise unless `x` is contiguous, `kind` is known, and weight and bias are `[width]` in the dtype of `x`."""
    if not x.ndim:
        raise ValueError("x: expected shape [..., C], got a scalar")
    check_tensor("x", x, tuple(x.shape), None, x)
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind: expected 'rms' or 'layer', got {kind!r}")
    check_tensor("weight", weight, (width,), x.dtype, x)
    if bias is not None:
        if kind == "rms":
            raise ValueError(f"bias: RMSNorm has none, expected None, got a tensor {list(bias.shape)}")
        check_tensor("bias", bias, (width,), x.dtype, x)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: NormKind = "rms",
    eps: float = NORM_EPS,
    impl: Impl = "auto",
) -> Tensor:
    """Normalise over the last dimension: RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450), fp32 statistics.

    I/O: reads `x` once, writes as many elements; about 6 FLOPs each.

    Args:
        x: `[..., C]`, contiguous, float32, bfloat16 or float16.
        weight: `[C]` in the dtype of `x`.
        bias: `[C]` in the dtype of `x`, for LayerNorm only, or None.
        kind: `"rms"` or `"layer"`.
        eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[..., C]` in the dtype of `x`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `kind` is unknown; RMSNorm is given a bias;
            `"triton"` is asked for gradients.
    """
    check_floating("x", x, "[..., C]")
    check_norm(x, weight, bias, kind, x.shape[-1] if x.ndim else 1)
    if not use_triton(impl, x, weight, bias):
        return reference.norm(x, weight, bias, kind, eps)
    from qwenvit.kernels.norm import norm_op

    return norm_op(x, weight, bias, kind, eps)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: NormKind = "rms",
    eps: float = NORM_EPS,
    shift: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the norm of `x + residual`, and the sum `x + residual + shift`.

    I/O: reads `x` and `residual`, writes the norm and the sum; about 7 FLOPs for each element of `x`.

    Args:
        x: `[..., C]`, contiguous, float32, bfloat16 or float16.
        residual: shape and dtype of `x`, contiguous.
        weight: `[C]` in the dtype of `x`.
        bias: `[C]` in the dtype of `x`, for LayerNorm only, or None.
        kind: `"rms"` or `"layer"`.
        eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
        shift: `[C]` in the dtype of `x`, added to the returned sum but not to the normalised one; None means zero. If
            the next matrix product accumulates onto the sum, its bias passed here needs no pass of its own.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        The norm and the sum, each `[..., C]` in the dtype of `x`. `"triton"` normalises the unrounded fp32 sum,
        `"reference"` the rounded one.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `kind` is unknown; RMSNorm is given a bias;
            `"triton"` is asked for gradients.
    """
    _check_add_norm(x, residual, weight, bias, kind, shift)
    if not use_triton(impl, x, residual, weight, bias, shift):
        return reference.add_norm(x, residual, weight, bias, shift, kind, eps)
    from qwenvit.kernels.norm import add_norm_op

    return add_norm_op(x, residual, weight, bias, shift, kind, eps)


def add_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: NormKind = "rms",
    eps: float = NORM_EPS,
    shift: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the norm of `x + residual`, and write the sum `x + residual + shift` to `residual`.

    I/O: reads `x` and `residual`, writes the norm and the sum; about 7 FLOPs for each element of `x`.

    Args:
        x: `[..., C]`, contiguous, float32, bfloat16 or float16.
        residual: shape and dtype of `x`, contiguous. Overwritten; must not share memory with `x`.
        weight: `[C]` in the dtype of `x`.
        bias: `[C]` in the dtype of `x`, for LayerNorm only, or None.
        kind: `"rms"` or `"layer"`.
        eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
        shift: `[C]` in the dtype of `x`, added to the stored sum but not to the normalised one; None means zero. If the
            next matrix product accumulates onto the sum, its bias passed here needs no pass of its own.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        The norm, `[..., C]` in the dtype of `x`. `"triton"` normalises the unrounded fp32 sum, `"reference"` the
        rounded one.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `kind` is unknown; RMSNorm is given a bias;
            `"triton"` is asked for gradients.
    """
    _check_add_norm(x, residual, weight, bias, kind, shift)
    if not use_triton(impl, x, residual, weight, bias, shift):
        y, total = reference.add_norm(x, residual, weight, bias, shift, kind, eps)
        residual.copy_(total)
        return y
    from qwenvit.kernels.norm import add_norm_inplace_op

    return add_norm_inplace_op(x, residual, weight, bias, shift, kind, eps)


def _check_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind, shift: Tensor | None
) -> None:
    check_floating("x", x, "[..., C]")
    check_norm(x, weight, bias, kind, x.shape[-1] if x.ndim else 1)
    check_tensor("residual", residual, tuple(x.shape), x.dtype, x)
    if shift is not None:
        check_tensor("shift", shift, (x.shape[-1],), x.dtype, x)
