"""The grid plan on the GPU: a small table of the grids goes there, and everything else is computed there.

`GridPlan` says what each tensor means and is computed on the host; this plan costs two or three launches and no host
time that grows with the patches. It has spare capacity: one capacity of patches, frames and windows serves any grids
that fit, so a CUDA graph can contain it.
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
    """What grids need.

    Args:
        grid: `[items, 3]` int64 on the CPU, checked (`qwenvit.plan.grid_plan.check_grid`).
        config: the tower's config.
    """
    t, h, w = grid.numpy().T
    patches, windows = int((t * h * w).sum()), int((t * _windows(h, w, config)).sum())
    return Capacity(patches, int(t.sum()), windows, len(grid), int(max(h.max(), w.max())))


def grid_table(grid: Tensor, config: VisionConfig, items: int) -> Tensor:
    """`[items + 1, 5]` int64 on the CPU: patches, frames and windows before each item; its rows and columns of patches.

    Rows past the last item hold the totals.
    """
    t, h, w = grid.numpy().T
    n = len(grid)
    table = np.full((items + 1, 5), config.spatial_merge_size, dtype=np.int64)
    table[:n, 3], table[:n, 4] = h, w
    table[0, :3] = 0
    for column, count in enumerate((h * w, 1, _windows(h, w, config))):
        table[1 : n + 1, column] = np.cumsum(t * count)
    table[n + 1 :, :3] = table[n, :3]
    return torch.from_numpy(table)


def _windows(h: np.ndarray, w: np.ndarray, config: VisionConfig) -> np.ndarray:
    if config.window_size is None:
        return np.zeros_like(h)
    side = config.window_size // config.patch_size
    return -(-h // side) * -(-w // side)


def angle_tables(config: VisionConfig, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. side, `[side, head_dim / 4]` fp32 each, computed where `GridPlan`'s are."""
    positions = torch.arange(side, device=device)[:, None].expand(-1, 2)
    quarter = config.head_dim // 4
    cos, sin = rope_cos_sin(positions, config.head_dim, config.rope_theta)
    return cos[:, :quarter].contiguous(), sin[:, :quarter].contiguous()


def compute_plan(
    table: Tensor, angles: tuple[Tensor, Tensor], config: VisionConfig, room: Capacity, impl: Impl
) -> DevicePlan:
    """The plan of the items in a table.

    Args:
        table: of `grid_table`, on the device.
        angles: of `angle_tables`, on the device.
        config: the tower's config.
        room: how large the tensors are; covers what the table holds.
        impl: see `qwenvit.ops`.
    """
    cos, sin, frames, windows, restore_index, taps, weights = ops.grid_plan(
        table, *angles, config, room.patches, room.frames, room.windows, impl
    )
    longest_window = (config.window_size or 0) // config.patch_size
    return DevicePlan(
        cos,
        sin,
        Segments(frames, room.patches, ()),
        None if windows is None else Segments(windows, longest_window**2, ()),
        restore_index,
        taps,
        weights,
    )
