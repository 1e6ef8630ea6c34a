"""Joining patches into tokens: a merger up to its first matrix product, and the merge of a feature map."""

from typing import Literal

import torch
from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import NORM_EPS
from qwenvit.ops import reference
from qwenvit.ops.checks import check_floating, check_tensor
from qwenvit.ops.dispatch import use_triton
from qwenvit.ops.norms import NormKind, check_norm


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
    check_norm(x, weight, bias, kind, merge_unit * width if norm_merged else width)
    if restore_index is not None:
        check_tensor("restore_index", restore_index, (patches // merge_unit,), torch.int64, x)
    arguments = (x, weight, bias, restore_index, kind, eps, norm_merged, merge_unit)
    if not use_triton(impl, x):
        return reference.merge_norm(*arguments)
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
        return reference.spatial_merge(x, mode, merge_size)
    from qwenvit.kernels.spatial_merge import spatial_merge_op

    return spatial_merge_op(x, mode, merge_size) if x.ndim == 4 else spatial_merge_op(x[None], mode, merge_size)[0]
