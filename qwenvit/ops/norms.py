"""Norms, and what stands between the last block and a merger's first matrix product."""

from typing import Literal

from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import NORM_EPS
from qwenvit.ops import reference
from qwenvit.ops.checks import check_floating, check_tensor
from qwenvit.ops.dispatch import use_triton

NormKind = Literal["rms", "layer"]


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, width: int) -> None:
    """Refuse what the norm kernels would misread."""
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
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension, statistics in fp32.

    Args:
        x: `[..., C]`, contiguous, float32, bfloat16 or float16.
        weight: `[C]` in the dtype of `x`.
        bias: same, for LayerNorm; None for none.
        kind: which norm.
        eps: added to the mean square or the variance.
        impl: see `qwenvit.ops`; `"triton"` is for inference, no gradient flows through it.

    Returns:
        Same shape and dtype as `x`. I/O: reads x, writes as much; about 6 FLOPs an element.
    """
    check_floating("x", x, "[..., C]")
    check_norm(x, weight, bias, kind, x.shape[-1] if x.ndim else 1)
    if not use_triton(impl, x):
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
    """The norm of `x + residual`, and that sum.

    Args:
        x: `[..., C]`, as for `norm`.
        residual: as `x`.
        weight: as for `norm`, like the arguments after it.
        bias: see there.
        kind: see there.
        eps: see there.
        shift: `[C]` in the dtype of `x`, added to the sum that is returned and not to the one that is normalised: the
            bias of a product that will be accumulated onto it. None for none.
        impl: see there.

    Returns:
        The norm and the sum, each as `x`. `"triton"` normalises the sum before rounding it, `"reference"` after.
        I/O: reads x and residual, writes as much; about 7 FLOPs an element.
    """
    _check_add_norm(x, residual, weight, bias, kind, shift)
    if not use_triton(impl, x):
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
    """`add_norm` whose sum takes the place of `residual`, which therefore may not share memory with `x`.

    Returns:
        The norm, as `x`.
    """
    _check_add_norm(x, residual, weight, bias, kind, shift)
    if not use_triton(impl, x):
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
