"""Pixel values to the tower's first hidden states, and learned positions."""

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
    """Learned positions of patches: four entries of the table, weighted and summed in fp32.

    Args:
        table: `[entries, C]`, float32, bfloat16 or float16.
        taps: `[patches, 4]` int64, entries of the table (`GridPlan.position_taps`); trusted to lie in it.
        tap_weights: `[patches, 4]` fp32 (`GridPlan.position_weights`).
        impl: see `norm`.

    Returns:
        `[patches, C]` in the dtype of `table`. I/O: reads the table and 48 bytes a patch, writes the result; 8 FLOPs
        an element.
    """
    check_floating("table", table, "[entries, C]")
    _check_positions(table, taps, tap_weights, None, None, table)
    if not use_triton(impl, table):
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
    """Embedded patches plus their learned positions, in the tower's order.

    Args:
        x: `[patches, C]`, float32, bfloat16 or float16, in reading order.
        table: `[entries, C]` in the dtype of `x`; see `interpolate_positions`, also for the next two.
        taps: `[patches, 4]`.
        tap_weights: `[patches, 4]`.
        restore_index: `[patches / merge_unit]` int64, the place in the tower's order of each token in reading order
            (`GridPlan.restore_index`); trusted to be a permutation. None for reading order.
        merge_unit: patches in a token.
        impl: see `norm`.

    Returns:
        As `x`. `"triton"` rounds once, after the sum. I/O: reads x, the table and 48 bytes a patch, writes as much as
        x; 9 FLOPs an element.
    """
    check_floating("x", x, "[patches, C]")
    check_tensor("x", x, (None, None), None, x)
    _check_positions(table, taps, tap_weights, x.shape[0], x.shape[1], x)
    _check_order(restore_index, x.shape[0], merge_unit, x)
    if not use_triton(impl, x):
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
    """Patches to the tower's first hidden states: linear map, learned positions, window order.

    Args:
        pixel_values: `[patches, K]`, float32, bfloat16 or float16, in reading order; converted to the dtype of
            `weight` by a pass of their own.
        weight: `[C, K]`, the convolution's kernel flattened, with unit stride along K; it sets the dtype. Rows that are
            a multiple of 128 bytes apart (a view of a padded tensor) are read faster.
        bias: `[C]`; None for none.
        table: as for `add_positions`, with the next two; None for no learned positions.
        taps: see there.
        tap_weights: see there.
        restore_index: see there.
        merge_unit: patches in a token.
        impl: see `norm`.

    Returns:
        `[patches, C]`. I/O: reads pixel_values, weight and table, writes the result. Besides, rows to be converted, or
        to be reordered where `qwenvit.kernels.gemm.patch_embed.fused_is_faster` says no, are written and read once
        more, and so are learned positions. 2 · patches · K · C FLOPs.
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
    if not use_triton(impl, weight):
        return reference.patch_embed(*arguments)
    from qwenvit.kernels.gemm.patch_embed import patch_embed_op

    return patch_embed_op(*arguments)
