"""Everything a tower needs to know of its grids, from a table of them."""

import torch
from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops import reference
from qwenvit.ops.checks import check_tensor
from qwenvit.ops.dispatch import use_triton

Plan = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def grid_plan(
    table: Tensor,
    cos_table: Tensor,
    sin_table: Tensor,
    config: VisionConfig,
    patches: int,
    frames: int,
    windows: int,
    impl: Impl = "auto",
) -> Plan:
    """Positions, order, segments and table entries of packed grids; nothing is read back.

    Args:
        table: `[items + 1, 5]` int64 (`qwenvit.graphs.device_plan.grid_table`); its values are trusted.
        cos_table: `[positions, D / 4]` fp32, cosines of one axis' angles; positions reach beyond every row and column.
        sin_table: same.
        config: the tower's: merge size, windows, learned positions.
        patches: room for patches, a multiple of the merge unit.
        frames: room for frame groups.
        windows: room for windows.
        impl: see the module `qwenvit.ops`.

    Returns:
        cos and sin `[patches, D]` fp32, `cu_seqlens` of frames `[frames + 1]` and of windows `[windows + 1]` int32,
        restore_index `[patches / merge unit]` int64, position taps `[patches, 4]` int64 and weights fp32, each as in
        `GridPlan`, in the tower's order; None for what the tower has none of. Writes 8·D + 48 bytes a
        patch.

    Raises:
        TypeError, ValueError: tensors that are not these; heads of more than 128 channels.
    """
    check_tensor("table", table, (None, 5), torch.int64, table)
    for name, angles in (("cos_table", cos_table), ("sin_table", sin_table)):
        check_tensor(name, angles, (None, config.head_dim // 4), torch.float32, table)
    if config.head_dim > 128:
        raise ValueError(f"config: expected a head_dim of at most 128, got {config.head_dim}")
    if patches % config.merge_unit:
        raise ValueError(f"patches: expected a multiple of {config.merge_unit}, got {patches}")
    if not use_triton(impl, table):
        return reference.grid_plan(table, config, patches, frames, windows)
    from qwenvit.kernels.grid_plan import launch_grid_plan

    merge = config.spatial_merge_size
    side = (config.window_size or 0) // config.patch_size // merge
    return launch_grid_plan(table, cos_table, sin_table, patches, frames, windows, merge, side, config.position_grid)
