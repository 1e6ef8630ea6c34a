"""Everything a tower needs that depends on the grids alone, computed once per call and passed down as data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig
from qwenvit.plan.inputs import CheckedGrid, check_grid
from qwenvit.plan.rope import rope_cos_sin


@dataclass(frozen=True)
class Segments:
    """Runs of patches that attend to one another: whole frames, or windows."""

    cu_seqlens: Tensor
    """`[segments + 1]` int32: the first patch of each segment, then the number of patches."""
    max_seqlen: int
    """Patches in the longest segment."""
    groups: tuple[tuple[int, Tensor], ...]
    """Segments grouped by length: `(length, [segments, length] int64 patch indices)` for each length."""


@dataclass(frozen=True)
class GridPlan:
    """Positions, order and attention segments of a batch of images and videos, packed one after another.

    Patches of a frame are in merge-block order: the `spatial_merge_size`² patches of a merged token are neighbours,
    and tokens follow in reading order. Towers with windows reorder tokens so that each window is contiguous: the
    tower's order. Every per-patch tensor here is in the tower's order.
    """

    grid_thw: Tensor
    """`[items, 3]` int64 on the CPU: frame groups, rows and columns of patches of each item."""
    position_ids: Tensor
    """`[patches, 2]` int64: row and column of each patch in its frame."""
    cos: Tensor
    """`[patches, head_dim]` fp32: cosines of the RoPE angles."""
    sin: Tensor
    """`[patches, head_dim]` fp32: sines of the RoPE angles."""
    frames: Segments
    """Segments of full attention: one for each frame group."""
    windows: Segments | None
    """Segments of window attention; None in towers without windows."""
    window_index: Tensor | None
    """`[tokens]` int64: reading order -> tower's order, `in_tower_order = in_reading_order[window_index]`."""
    restore_index: Tensor | None
    """`[tokens]` int64: tower's order -> reading order, the inverse of `window_index`."""
    position_taps: Tensor | None
    """`[patches, 4]` int64: the rows of the learned position table that are interpolated for each patch."""
    position_weights: Tensor | None
    """`[patches, 4]` fp32: the bilinear weights of those rows."""

    @property
    def num_patches(self) -> int:
        """Rows of the `pixel_values` that the plan is for."""
        return self.position_ids.shape[0]

    @classmethod
    def build(
        cls,
        grid_thw: Tensor | Sequence[Sequence[int]] | CheckedGrid,
        config: VisionConfig,
        device: torch.device | str = "cpu",
    ) -> "GridPlan":
        """Compute the plan for the grids of a batch.

        Args:
            grid_thw: `[items, 3]` integers, frame groups x rows x columns of patches. The host reads it: a CPU tensor
                avoids a synchronisation. A `CheckedGrid` is not checked again.
            config: the tower's config.
            device: where the plan's tensors go (`grid_thw` stays on the CPU).

        Raises:
            ValueError: wrong shape or dtype, sizes below 1, or rows and columns that do not split into merge blocks.
        """
        checked = grid_thw if isinstance(grid_thw, CheckedGrid) else check_grid(grid_thw, config.spatial_merge_size)
        grid = checked.tensor
        frame, row, column = patch_coordinates(grid, config.spatial_merge_size)
        heights, widths = grid[:, 1].repeat_interleave(grid[:, 0]), grid[:, 2].repeat_interleave(grid[:, 0])
        position_ids = torch.stack((row, column), dim=1)
        frames = _segments(heights * widths, device)
        windows = window_index = restore_index = taps = weights = None
        if config.window_size is not None:
            window_index, lengths = window_order(heights, widths, frame, position_ids, config)
            windows = _segments(lengths, device)
            restore_index = window_index.argsort()
            position_ids = position_ids.unflatten(0, (-1, config.merge_unit))[window_index].flatten(0, 1)
            window_index, restore_index = window_index.to(device), restore_index.to(device)
        if config.num_position_embeddings is not None:
            taps, weights = _position_taps(row, column, heights[frame], widths[frame], config.position_grid)
            taps, weights = taps.to(device), weights.to(device)
        position_ids = position_ids.to(device)
        cos, sin = rope_cos_sin(position_ids, config.head_dim, config.rope_theta)
        return cls(grid, position_ids, cos, sin, frames, windows, window_index, restore_index, taps, weights)


@dataclass(frozen=True)
class DevicePlan:
    """The tensors of a `GridPlan` that a tower reads, padded to a capacity.

    Padding patches follow the last item: they have position 0, belong to no segment, and stay at the end of the
    tower's order.
    """

    cos: Tensor
    """`[capacity.patches, head_dim]` fp32."""
    sin: Tensor
    """`[capacity.patches, head_dim]` fp32."""
    frames: Segments
    """`cu_seqlens` is `[capacity.frames + 1]` int32; `groups` is empty."""
    windows: Segments | None
    """`cu_seqlens` is `[capacity.windows + 1]` int32; `groups` is empty. None in towers without windows."""
    restore_index: Tensor | None
    """`[capacity.patches / merge_unit]` int64; None in towers without windows."""
    position_taps: Tensor | None
    """`[capacity.patches, 4]` int64; None in towers without learned positions."""
    position_weights: Tensor | None
    """`[capacity.patches, 4]` fp32; None in towers without learned positions."""


def patch_coordinates(grid: Tensor, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the frame number, row and column of every patch, `[patches]` int64 each, in merge-block order."""
    sizes = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0])  # patches of each frame
    widths = grid[:, 2].repeat_interleave(grid[:, 0])
    frame = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
    index_in_frame = torch.arange(len(frame), device="cpu") - (sizes.cumsum(0) - sizes)[frame]
    block, inner = index_in_frame // merge**2, index_in_frame % merge**2
    blocks_per_row = (widths // merge)[frame]
    row = block // blocks_per_row * merge + inner // merge
    column = block % blocks_per_row * merge + inner % merge
    return frame, row, column


def _segments(lengths: Tensor, device: torch.device | str) -> Segments:
    """Return the segments of these lengths, one after another."""
    ends = lengths.cumsum(0)
    cu_seqlens = torch.cat((ends.new_zeros(1), ends))
    groups = []
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]
        groups.append((length, (starts[:, None] + torch.arange(length, device="cpu")).to(device)))
    return Segments(cu_seqlens.to(device, torch.int32), int(lengths.max()), tuple(groups))


def window_order(
    heights: Tensor, widths: Tensor, frame: Tensor, position_ids: Tensor, config: VisionConfig
) -> tuple[Tensor, Tensor]:
    """Sort tokens by window, in towers with windows.

    Windows are squares of `config.window_size` pixels, cut off at the frame's right and lower edges. Windows follow in
    reading order, and so do the tokens of each.

    Args:
        heights: rows of patches of each frame, `[frames]` int64.
        widths: columns of patches of each frame, `[frames]` int64.
        frame: the frame number of each patch, `[patches]` int64.
        position_ids: the row and column of each patch, `[patches, 2]` int64, in merge-block order like `frame`.
        config: the tower's config.

    Returns:
        `window_index` `[tokens]` int64, and the length of each window in patches, `[windows]` int64.
    """
    merge, unit = config.spatial_merge_size, config.merge_unit
    side = (config.window_size or 0) // config.patch_size // merge  # in tokens
    window_rows = (heights // merge + side - 1) // side
    window_columns = (widths // merge + side - 1) // side
    windows_before = (window_rows * window_columns).cumsum(0) - window_rows * window_columns
    token_frame, token_position = frame[::unit], position_ids[::unit] // (merge * side)
    window = windows_before[token_frame] + token_position[:, 0] * window_columns[token_frame] + token_position[:, 1]
    return window.argsort(stable=True), window.bincount() * unit


def _position_taps(row: Tensor, column: Tensor, height: Tensor, width: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Interpolate a `side` x `side` table bilinearly, corners aligned, at each patch.

    Returns:
        Rows of the table, `[patches, 4]` int64, and their weights, `[patches, 4]` fp32, in the order (upper left,
        upper right, lower left, lower right).
    """

    def axis(index: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        position = index.float() * (side - 1) / (size - 1).clamp(min=1)
        low = position.floor()
        low_weight = 1 - (position - low)
        taps = torch.stack((low.long(), (low.long() + 1).clamp(max=side - 1)), dim=1)
        return taps, torch.stack((low_weight, 1 - low_weight), dim=1)  # in transformers' order of rounding

    row_taps, row_weights = axis(row, height)
    column_taps, column_weights = axis(column, width)
    taps = row_taps[:, :, None] * side + column_taps[:, None, :]
    return taps.flatten(1), (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1)
