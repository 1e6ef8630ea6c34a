"""Merging of patches: a merger's norm and reordering before its first matrix product, and blocks of a feature map."""

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
    """Compute the input of a merger's first matrix product: norm, merge patches to tokens, restore reading order.

    I/O: reads `x` once, writes as many elements; about 6 FLOPs each.

    Args:
        x: `[patches, C]`, contiguous, float32, bfloat16 or float16. Each `merge_unit` consecutive rows are one token.
        weight: in the dtype of `x`: `[C]`, or `[merge_unit * C]` if `norm_merged`.
        bias: shape and dtype of `weight`, for LayerNorm only, or None.
        restore_index: `[tokens]` int64: output row i is input token `restore_index[i]` (`GridPlan.restore_index`). Its
            values are not checked. None keeps the order.
        kind: `"rms"` or `"layer"`.
        eps: added to the mean square (RMSNorm) or the variance (LayerNorm).
        norm_merged: False normalises each patch over C; True normalises each token over `merge_unit * C`, as the
            DeepStack mergers do.
        merge_unit: patches in a token.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[patches / merge_unit, merge_unit * C]` in the dtype of `x`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `kind` is unknown; RMSNorm is given a bias;
            `merge_unit` does not divide the patches; `"triton"` is asked for gradients.
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
    if not use_triton(impl, x, weight, bias):
        return reference.merge_norm(*arguments)
    from qwenvit.kernels.spatial_merge import merge_norm_op

    return merge_norm_op(*arguments)


def spatial_merge(
    x: Tensor, mode: Literal["concat", "average"] = "concat", merge_size: int = 2, impl: Impl = "auto"
) -> Tensor:
    """Merge square blocks of a feature map. I/O: reads `x` once, writes the result once.

    Args:
        x: `[H, W, C]` or `[T, H, W, C]`, float32, bfloat16 or float16, with unit stride along C.
        mode: `"concat"` concatenates the channels of a block's cells in reading order, `"average"` averages them.
        merge_size: side of a block in cells; divides H and W.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[H / merge_size, W / merge_size, C']`, after T if `x` has it, in the dtype of `x`; C' is `merge_size² * C` for
        `"concat"` and C for `"average"`.

    Raises:
        TypeError: `x` has another type or dtype.
        ValueError: `x` has another shape or stride; `mode` is unknown; `merge_size` does not divide H and W;
            `"triton"` is asked for gradients.
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
