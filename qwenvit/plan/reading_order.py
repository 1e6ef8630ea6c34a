"""From the tower's order of patches to reading order, computed from the grids alone."""

import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig
from qwenvit.plan.grid_plan import patch_coordinates, window_order


def reading_order(grid: Tensor, config: VisionConfig, by_token: bool = False) -> Tensor:
    """Return the index that puts a tower's hidden states in reading order: `in_reading_order = hidden_states[index]`.

    Items and their frames stay one after another.

    Args:
        grid: `[items, 3]` int64 on the CPU, checked by `qwenvit.plan.inputs.check_grid`.
        config: the tower's config.
        by_token: put the merged tokens of each frame in reading order rather than its patches; the
            `spatial_merge_size`² patches of each token are neighbours, in reading order among themselves.

    Returns:
        `[patches]` int64 on the CPU.
    """
    merge, unit = config.spatial_merge_size, config.merge_unit
    frame, row, column = patch_coordinates(grid, merge)
    heights, widths = grid[:, 1].repeat_interleave(grid[:, 0]), grid[:, 2].repeat_interleave(grid[:, 0])
    position = torch.arange(len(frame), device="cpu")  # of each patch in the tower's order, from merge-block order
    if config.window_size is not None:
        window_index, _ = window_order(heights, widths, frame, torch.stack((row, column), dim=1), config)
        position = (window_index.argsort()[:, None] * unit + torch.arange(unit, device="cpu")).flatten()
    if by_token:
        return position
    patches_before = (heights * widths).cumsum(0) - heights * widths
    index = torch.empty_like(position)
    index[patches_before[frame] + row * widths[frame] + column] = position
    return index
