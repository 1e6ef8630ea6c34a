"""What the operations behind `qwenvit/ops.py` mean, in plain torch: the reference tower's own steps, any device.

The doors check their arguments; here they are taken as they come. Dtypes are rounded to where the reference tower
rounds to them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """See `qwenvit.ops.norm`."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """See `qwenvit.ops.add_norm`."""
    total = x + residual
    return norm(total, weight, bias, kind, eps), total


def merge_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    restore_index: Tensor | None,
    kind: str,
    eps: float,
    norm_merged: bool,
    merge_unit: int,
) -> Tensor:
    """See `qwenvit.ops.merge_norm`."""
    joined = (-1, merge_unit * x.shape[-1])
    y = norm(x.view(joined), weight, bias, kind, eps) if norm_merged else norm(x, weight, bias, kind, eps).view(joined)
    return y if restore_index is None else y[restore_index]


def spatial_merge(x: Tensor, mode: str, merge_size: int) -> Tensor:
    """See `qwenvit.ops.spatial_merge`."""
    blocks = x.unflatten(-2, (-1, merge_size)).unflatten(-4, (-1, merge_size)).transpose(-4, -3)
    return blocks.flatten(-3) if mode == "concat" else blocks.mean((-3, -2))


def interpolate_positions(table: Tensor, taps: Tensor, tap_weights: Tensor) -> Tensor:
    """See `qwenvit.ops.interpolate_positions`."""
    return (table[taps] * tap_weights[:, :, None]).sum(1).to(table.dtype)


def _reorder(x: Tensor, restore_index: Tensor | None, merge_unit: int) -> Tensor:
    if restore_index is None:
        return x
    tokens = x.unflatten(0, (-1, merge_unit))
    return torch.empty_like(tokens).index_copy(0, restore_index, tokens).flatten(0, 1)


def add_positions(
    x: Tensor, table: Tensor, taps: Tensor, tap_weights: Tensor, restore_index: Tensor | None, merge_unit: int
) -> Tensor:
    """See `qwenvit.ops.add_positions`."""
    return _reorder(x + interpolate_positions(table, taps, tap_weights), restore_index, merge_unit)


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    taps: Tensor | None,
    tap_weights: Tensor | None,
    restore_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    """See `qwenvit.ops.patch_embed`."""
    x = F.linear(pixel_values.to(weight.dtype), weight, bias)
    if table is not None and taps is not None and tap_weights is not None:
        return add_positions(x, table, taps, tap_weights, restore_index, merge_unit)
    return _reorder(x, restore_index, merge_unit)
