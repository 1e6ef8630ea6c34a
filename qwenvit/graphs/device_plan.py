"""The grid plan computed on the GPU, from a small table of the grids.

`GridPlan` defines the same tensors and computes them on the host. This plan takes two or three launches, and its host
time does not grow with the patches. It is padded to a capacity of patches, frames and windows, so a CUDA graph can
contain it and serve any grids that fit.
"""

import numpy as np
import torch
from torch import Tensor

from qwenvit import ops
from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.graphs.capacity import Capacity
from qwenvit.plan.grid_plan import DevicePlan, Segments
from qwenvit.plan.rope import rope_cos_sin


def measure_grids(grid: Tensor, config: VisionConfig) -> Capacity:
    """Return the capacity that grids need.

    Args:
        grid: `[items, 3]` int64 on the CPU, checked by `qwenvit.plan.inputs.check_grid`.
        config: the tower's config.
    """
    t, h, w = grid.numpy().T
    patches, windows = int((t * h * w).sum()), int((t * _windows_per_frame(h, w, config)).sum())
    return Capacity(patches, int(t.sum()), windows, len(grid), int(max(h.max(), w.max())))


def grid_table(grid: Tensor, config: VisionConfig, items: int) -> Tensor:
    """Return the table from which `compute_plan` computes the plan.

    Args:
        grid: `[items in the batch, 3]` int64 on the CPU, checked by `qwenvit.plan.inputs.check_grid`.
        config: the tower's config.
        items: rows to pad the table to, less one.

    Returns:
        `[items + 1, 5]` int64 on the CPU: the number of patches, frames and windows before each item, and the item's
        rows and columns of patches. Rows past the last item have the totals.
    """
    t, h, w = grid.numpy().T
    n = len(grid)
    table = np.full((items + 1, 5), config.spatial_merge_size, dtype=np.int64)
    table[:n, 3], table[:n, 4] = h, w
    table[0, :3] = 0
    for column, count_per_frame in enumerate((h * w, 1, _windows_per_frame(h, w, config))):
        table[1 : n + 1, column] = np.cumsum(t * count_per_frame)
    table[n + 1 :, :3] = table[n, :3]
    return torch.from_numpy(table)


def _windows_per_frame(h: np.ndarray, w: np.ndarray, config: VisionConfig) -> np.ndarray:
    if config.window_size is None:
        return np.zeros_like(h)
    side = config.window_size // config.patch_size
    return -(-h // side) * -(-w // side)


def angle_tables(config: VisionConfig, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of positions 0 to side - 1, `[side, head_dim / 4]` fp32 each.

    `GridPlan` computes its own with the same function on the same device, so the bits are equal.
    """
    positions = torch.arange(side, device=device)[:, None].expand(-1, 2)
    quarter = config.head_dim // 4
    cos, sin = rope_cos_sin(positions, config.head_dim, config.rope_theta)
    return cos[:, :quarter].contiguous(), sin[:, :quarter].contiguous()


def compute_plan(
    table: Tensor, angles: tuple[Tensor, Tensor], config: VisionConfig, capacity: Capacity, impl: Impl
) -> DevicePlan:
    """Compute the plan of the items in a table.

    Args:
        table: `[items + 1, 5]` int64 on the device, from `grid_table`.
        angles: the cosines and sines from `angle_tables`, on the device.
        config: the tower's config.
        capacity: the numbers of patches, frames and windows to pad the plan to; at least those of the table's items.
        impl: implementation of the operations, see `qwenvit.ops`.
    """
    cos, sin, frames, windows, restore_index, taps, weights = ops.grid_plan(
        table, *angles, config, capacity.patches, capacity.frames, capacity.windows, impl
    )
    return DevicePlan(
        cos,
        sin,
        Segments(frames, capacity.patches, ()),
        None if windows is None else Segments(windows, config.window_patches, ()),
        restore_index,
        taps,
        weights,
    )
