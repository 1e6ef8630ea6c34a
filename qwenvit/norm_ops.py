"""Norms, and what stands between the last block and a merger's first matrix product."""

from typing import Literal

import torch
from torch import Tensor

from qwenvit import op_references
from qwenvit.arguments import Impl
from qwenvit.config import NORM_EPS
from qwenvit.dispatch import use_triton
from qwenvit.op_checks import check_floating, check_tensor

NormKind = Literal["rms", "layer"]


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, width: int) -> None:
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
    _check_norm(x, weight, bias, kind, x.shape[-1] if x.ndim else 1)
    if not use_triton(impl, x):
        return op_references.norm(x, weight, bias, kind, eps)
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
        return op_references.add_norm(x, residual, weight, bias, shift, kind, eps)
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
        y, total = op_references.add_norm(x, residual, weight, bias, shift, kind, eps)
        residual.copy_(total)
        return y
    from qwenvit.kernels.norm import add_norm_inplace_op

    return add_norm_inplace_op(x, residual, weight, bias, shift, kind, eps)


def _check_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, kind: NormKind, shift: Tensor | None
) -> None:
    check_floating("x", x, "[..., C]")
    _check_norm(x, weight, bias, kind, x.shape[-1] if x.ndim else 1)
    check_tensor("residual", residual, tuple(x.shape), x.dtype, x)
    if shift is not None:
        check_tensor("shift", shift, (x.shape[-1],), x.dtype, x)


def merge_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    restore_index: Tensor | None = None,
    kind: NormKind = "rms",
    eps: float = NORM_EPS,
    norm_merged: bool = False,
    merge_unit: int = 4,
    impl: Impl = "auto",
) -> Tensor:
    """A merger up to its first GEMM: norm, patches joined into tokens, tokens put back into reading order.

    Args:
        x: `[patches, C]` as for `norm`, the patches of a token neighbours.
        weight: `[C]`, or `[merge_unit * C]` where the joined token is normalised.
        bias: likewise; None for none.
        restore_index: `[tokens]` int64, the token to put at each place (`GridPlan.restore_index`); its values are
            trusted. None where tokens lie in reading order.
        kind: which norm.
        eps: as for `norm`.
        norm_merged: whether joined tokens are normalised, as by DeepStack's mergers, and not patches.
        merge_unit: patches in a token.
        impl: see `norm`.

    Returns:
        `[patches / merge_unit, merge_unit * C]`. I/O: reads x, writes as much; about 6 FLOPs an element.
    """
    check_floating("x", x, "[patches, C]")
    check_tensor("x", x, (None, None), None, x)
    patches, width = x.shape
    if merge_unit < 1 or patches % merge_unit:
        raise ValueError(f"merge_unit: expected a divisor of x's {patches} patches, got {merge_unit}")
    _check_norm(x, weight, bias, kind, merge_unit * width if norm_merged else width)
    if restore_index is not None:
        check_tensor("restore_index", restore_index, (patches // merge_unit,), torch.int64, x)
    arguments = (x, weight, bias, restore_index, kind, eps, norm_merged, merge_unit)
    if not use_triton(impl, x):
        return op_references.merge_norm(*arguments)
    from qwenvit.kernels.spatial_merge import merge_norm_op

    return merge_norm_op(*arguments)


def spatial_merge(
    x: Tensor, mode: Literal["concat", "average"] = "concat", merge_size: int = 2, impl: Impl = "auto"
) -> Tensor:
    """Join square blocks of a feature map.

    Args:
        x: `[H, W, C]` or `[T, H, W, C]`, float32, bfloat16 or float16, with unit stride along C.
        mode: `"concat"` joins the channels of a block in reading order, `"average"` takes their mean.
        merge_size: side of a block; divides H and W.
        impl: see `norm`.

    Returns:
        `[(T,) H / merge_size, W / merge_size, C']` where C' is `merge_size² * C` or C. I/O: reads x, writes the result.
    """
    check_floating("x", x, "[H, W, C] or [T, H, W, C]")
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected shape [H, W, C] or [T, H, W, C], got {list(x.shape)}")
    if mode not in ("concat", "average"):
        raise ValueError(f"mode: expected 'concat' or 'average', got {mode!r}")
    if merge_size < 1 or x.shape[-3] % merge_size or x.shape[-2] % merge_size:
        raise ValueError(f"merge_size: expected a divisor of H and W in x {list(x.shape)}, got {merge_size}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"x: expected unit stride along C, got strides {x.stride()} for shape {list(x.shape)}")
    if not use_triton(impl, x):
        return op_references.spatial_merge(x, mode, merge_size)
    from qwenvit.kernels.spatial_merge import spatial_merge_op

    return spatial_merge_op(x, mode, merge_size) if x.ndim == 4 else spatial_merge_op(x[None], mode, merge_size)[0]
