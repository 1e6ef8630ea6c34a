"""Patch embedding and learned positions: from pixel values to the input of the first block."""

import torch
from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import check_floating, check_tensor
from qwenvit.ops.dispatch import use_triton


def _check_positions(
    table: Tensor, taps: Tensor, tap_weights: Tensor, patches: int | None, width: int | None, like: Tensor
) -> None:
    check_tensor("table", table, (None, width), like.dtype, like)
    check_tensor("taps", taps, (patches, 4), torch.int64, like)
    check_tensor("tap_weights", tap_weights, (len(taps), 4), torch.float32, like)


def _check_order(restore_index: Tensor | None, patches: int, merge_unit: int, like: Tensor) -> None:
    if restore_index is None:
        return
    if merge_unit < 1 or patches % merge_unit:
        raise ValueError(f"merge_unit: expected a divisor of {patches} patches, got {merge_unit}")
    check_tensor("restore_index", restore_index, (patches // merge_unit,), torch.int64, like)


def interpolate_positions(table: Tensor, taps: Tensor, tap_weights: Tensor, impl: Impl = "auto") -> Tensor:
    """Interpolate learned positions: for each patch, the weighted sum of four rows of the table, in fp32.

    I/O: reads the table and 48 bytes a patch, writes the result; 8 FLOPs for each element of it.

    Args:
        table: `[entries, C]`, contiguous, float32, bfloat16 or float16.
        taps: `[patches, 4]` int64, contiguous: rows of the table (`GridPlan.position_taps`). `"triton"` does not check
            that they exist.
        tap_weights: `[patches, 4]` fp32, contiguous: the rows' weights (`GridPlan.position_weights`).
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[patches, C]` in the dtype of `table`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `"triton"` is asked for gradients.
    """
    check_floating("table", table, "[entries, C]")
    _check_positions(table, taps, tap_weights, None, None, table)
    if not use_triton(impl, table, tap_weights):
        return reference.interpolate_positions(table, taps, tap_weights)
    from qwenvit.kernels.gemm.patch_embed import interpolate_positions_op

    return interpolate_positions_op(table, taps, tap_weights)


def add_positions(
    x: Tensor,
    table: Tensor,
    taps: Tensor,
    tap_weights: Tensor,
    restore_index: Tensor | None = None,
    merge_unit: int = 4,
    impl: Impl = "auto",
) -> Tensor:
    """Add learned positions to embedded patches, and move tokens from reading order to window order.

    I/O: reads `x`, the table and 48 bytes a patch, writes as many elements as `x` has; 9 FLOPs each.

    Args:
        x: embedded patches `[patches, C]`, contiguous, float32, bfloat16 or float16, tokens in reading order.
        table: learned positions `[entries, C]` in the dtype of `x`, contiguous.
        taps: `[patches, 4]` int64, contiguous: rows of the table (`GridPlan.position_taps`). `"triton"` does not check
            that they exist.
        tap_weights: `[patches, 4]` fp32, contiguous: the rows' weights (`GridPlan.position_weights`).
        restore_index: `[patches / merge_unit]` int64: token i moves to `restore_index[i]`
            (`GridPlan.restore_index`). `"triton"` does not check that it is a permutation. None keeps reading order.
        merge_unit: patches in a token.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[patches, C]` in the dtype of `x`. `"triton"` rounds once, after the sum.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `merge_unit` does not divide the patches;
            `"triton"` is asked for gradients.
    """
    check_floating("x", x, "[patches, C]")
    check_tensor("x", x, (None, None), None, x)
    _check_positions(table, taps, tap_weights, x.shape[0], x.shape[1], x)
    _check_order(restore_index, x.shape[0], merge_unit, x)
    if not use_triton(impl, x, table, tap_weights):
        return reference.add_positions(x, table, taps, tap_weights, restore_index, merge_unit)
    from qwenvit.kernels.gemm.patch_embed import add_positions_op

    return add_positions_op(x, table, taps, tap_weights, restore_index, merge_unit)


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    taps: Tensor | None = None,
    tap_weights: Tensor | None = None,
    restore_index: Tensor | None = None,
    merge_unit: int = 4,
    impl: Impl = "auto",
) -> Tensor:
    """Embed patches: project pixel values, add learned positions, move tokens to window order. 2·patches·K·C FLOPs.

    I/O: reads `pixel_values`, `weight` and `table`, writes the result. Three things write and read rows once more:
    conversion to another dtype, reordering, and learned positions.

    Args:
        pixel_values: `[patches, K]`, contiguous, float32, bfloat16 or float16, tokens in reading order. A separate pass
            converts them to the dtype of `weight`.
        weight: `[C, K]`, float32, bfloat16 or float16: the flattened kernel of the convolution, with unit stride along
            K. It sets the dtype of the result. A row stride that is a multiple of 128 bytes (a view of a padded tensor)
            is read faster.
        bias: `[C]` in the dtype of `weight`, or None.
        table: learned positions `[entries, C]` in the dtype of `weight`, contiguous. `table`, `taps` and `tap_weights`
            are None for towers without learned positions.
        taps: `[patches, 4]` int64, contiguous: rows of the table (`GridPlan.position_taps`). `"triton"` does not check
            that they exist.
        tap_weights: `[patches, 4]` fp32, contiguous: the rows' weights (`GridPlan.position_weights`).
        restore_index: `[patches / merge_unit]` int64: token i moves to `restore_index[i]`
            (`GridPlan.restore_index`). `"triton"` does not check that it is a permutation. None keeps reading order.
        merge_unit: patches in a token.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[patches, C]` in the dtype of `weight`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; only some of `table`, `taps` and `tap_weights` are
            given; `merge_unit` does not divide the patches; `"triton"` is asked for gradients.
    """
    check_floating("weight", weight, "[C, K]")
    check_floating("pixel_values", pixel_values, "[patches, K]")
    if weight.ndim != 2 or weight.stride(1) != 1:
        got = f"{list(weight.shape)} with strides {weight.stride()}"
        raise ValueError(f"weight: expected shape [C, K] with unit stride along K, got {got}")
    width, patch_dim = weight.shape
    check_tensor("pixel_values", pixel_values, (None, patch_dim), None, weight)
    patches = pixel_values.shape[0]
    if bias is not None:
        check_tensor("bias", bias, (width,), weight.dtype, weight)
    if table is not None and taps is not None and tap_weights is not None:
        _check_positions(table, taps, tap_weights, patches, width, weight)
    elif table is not None or taps is not None or tap_weights is not None:
        given = [name for name, x in (("table", table), ("taps", taps), ("tap_weights", tap_weights)) if x is not None]
        raise ValueError(f"table, taps, tap_weights: expected all three or none, got {', '.join(given)}")
    _check_order(restore_index, patches, merge_unit, weight)
    arguments = (pixel_values, weight, bias, table, taps, tap_weights, restore_index, merge_unit)
    if not use_triton(impl, weight, pixel_values, bias, table, tap_weights):
        return reference.patch_embed(*arguments)
    from qwenvit.kernels.gemm.patch_embed import patch_embed_op

    return patch_embed_op(*arguments)
