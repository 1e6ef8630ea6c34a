"""The grid plan (positions, order, attention segments) computed on the device of a table of grids."""

import torch
from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops import reference
from qwenvit.ops.checks import check_tensor
from qwenvit.ops.dispatch import use_triton

GridPlanTensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""cos, sin, frames' cu_seqlens, windows' cu_seqlens, restore_index, position taps, position weights."""


def grid_plan(
    table: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    config: VisionConfig,
    patches: int,
    frames: int,
    windows: int,
    impl: Impl = "auto",
) -> GridPlanTensors:
    """Compute positions, token order, attention segments and position-table entries of a batch of grids.

    `"triton"` does not synchronise with the host, so a CUDA graph can contain it. It writes 8·D + 48 bytes a patch.

    Args:
        table: `[items + 1, 5]` int64, contiguous: row i has the patches, frames and windows before item i, then its
            rows and columns of patches; the last row has the totals (`qwenvit.graphs.device_plan.grid_table`).
            `"triton"` does not check the values.
        cos_table: `[positions, D / 4]` fp32, contiguous: cosines of the angles of a row or column number, for every
            number that occurs.
        sin_table: `[positions, D / 4]` fp32, contiguous: sines of the same angles.
        config: the tower's config; D is its head_dim.
        patches: capacity in patches, at least their number and a multiple of `config.merge_unit`.
        frames: capacity in frame groups.
        windows: capacity in attention windows.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        Seven tensors with the meaning of the fields of `GridPlan`: cos and sin, each `[patches, D]` fp32; cu_seqlens of
        frames `[frames + 1]` and of windows `[windows + 1]`, int32; restore_index `[patches / merge_unit]` int64;
        position taps `[patches, 4]` int64 and their weights `[patches, 4]` fp32. Those of windows and learned positions
        are None in towers without them. Spare patches are at position 0, belong to no segment and keep their place.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; head_dim is above 128; `merge_unit` does not divide
            `patches`.
    """
    check_tensor("table", table, (None, 5), torch.int64, table)
    for name, angles in (("cos_table", cos_table), ("sin_table", sin_table)):
        check_tensor(name, angles, (None, config.head_dim // 4), torch.float32, table)
    if config.head_dim > 128:
        raise ValueError(f"config: expected a head_dim of at most 128, got {config.head_dim}")
    if patches % config.merge_unit:
        raise ValueError(f"patches: expected a multiple of {config.merge_unit}, got {patches}")
    if not use_triton(impl, table, cos_table, sin_table):
        return reference.grid_plan(table, config, patches, frames, windows)
    from qwenvit.kernels.grid_plan import launch_grid_plan

    merge = config.spatial_merge_size
    side = (config.window_size or 0) // config.patch_size // merge
    return launch_grid_plan(table, cos_table, sin_table, patches, frames, windows, merge, side, config.position_grid)
