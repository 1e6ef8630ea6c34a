"""Checks of what a tower is called with: pixel values and their grids."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig

MAX_BATCH_PATCHES = 2**31 - 1
"""`cu_seqlens` are 32-bit integers, here as in every attention kernel that takes them."""

WritePixels = Callable[[Tensor], None]
"""Writes the pixel values of a batch into the rows it is given, `[patches, C·T·P·P]`, on the current stream."""


class CheckedGrid(NamedTuple):
    """Grids that `check_grid` has accepted, and what it computed on the way."""

    tensor: Tensor
    """`[items, 3]` int64 on the CPU: frame groups, rows and columns of patches of each item."""
    patches: int
    """Patches of all items together."""
    sizes: tuple[int, ...]
    """The numbers of `tensor`, under which to cache what depends on it; empty while torch.compile compiles, in any
    thread: `sizes_of` gives them then."""


def check_grid(grid_thw: Tensor | Sequence[Sequence[int]], spatial_merge_size: int) -> CheckedGrid:
    """Check `grid_thw` and count its patches.

    Args:
        grid_thw: `[items, 3]` integers on any device: frame groups, rows and columns of patches.
        spatial_merge_size: rows and columns must be multiples of it.

    Raises:
        ValueError: wrong shape or dtype, no item, sizes below 1, rows or columns that do not split into merge blocks,
            or more than 2³¹ - 1 patches.
    """
    try:
        grid = grid_thw if isinstance(grid_thw, Tensor) else torch.as_tensor(grid_thw, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"grid_thw: expected [items, 3] integers (frames, rows, columns): {error}") from error
    shape, is_int64 = grid.shape, grid.dtype == torch.int64
    if len(shape) != 2 or shape[1] != 3 or (not is_int64 and (grid.is_floating_point() or grid.is_complex())):
        raise ValueError(
            f"grid_thw: expected [items, 3] integers (frames, rows, columns), got {list(grid.shape)} {grid.dtype}"
        )
    if not is_int64 or not grid.is_cpu:
        grid = grid.to("cpu", torch.int64)
    if not shape[0]:
        raise ValueError("grid_thw: expected at least one item, got none")
    if torch.compiler.is_compiling():  # Dynamo traces into the cache, and knows no numbers of a list
        return CheckedGrid(grid, _count_patches(grid.numpy(), spatial_merge_size), ())
    sizes = sizes_of(grid)
    return CheckedGrid(grid, _count_patches_cached(sizes, spatial_merge_size), sizes)


def sizes_of(grid: Tensor) -> tuple[int, ...]:
    """Return the numbers of a checked `[items, 3]` grid: of a few items sooner there than numpy's bytes (TUNING.md)."""
    return tuple(chain.from_iterable(grid.tolist()))


@lru_cache(maxsize=1024)
def _count_patches_cached(sizes: tuple[int, ...], spatial_merge_size: int) -> int:
    """Count the patches of grids that often come again: checking them anew delays the GPU (TUNING.md)."""
    return _count_patches(np.array(sizes, dtype=np.int64).reshape(-1, 3), spatial_merge_size)


def _count_patches(rows: np.ndarray, spatial_merge_size: int) -> int:
    # Multiply in floating point: the product of absurd sizes would wrap around to a harmless integer.
    if (patches := float(rows.astype(np.float64).prod(1).sum())) > MAX_BATCH_PATCHES:
        raise ValueError(f"grid_thw: expected at most {MAX_BATCH_PATCHES} patches in a batch, got {patches:.3g}")
    if rows.min() < 1 or (rows[:, 1:] % spatial_merge_size).any():
        bad = (rows < 1).any(1) | (rows[:, 1:] % spatial_merge_size != 0).any(1)
        item = int(bad.argmax())
        raise ValueError(
            f"grid_thw: expected positive sizes, rows and columns multiples of {spatial_merge_size}; "
            f"item {item} is {rows[item].tolist()}"
        )
    return int(patches)


def check_pixel_values(pixel_values: Tensor, grid: CheckedGrid, config: VisionConfig) -> None:
    """Check that `pixel_values` has the tower's width and a row for each patch of the grids.

    Args:
        pixel_values: `[patches, C·T·P·P]` in any floating dtype.
        grid: the grids that came with it.
        config: the tower's config.

    Raises:
        TypeError: not a floating tensor.
        ValueError: any other shape.
    """
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"pixel_values: expected a floating tensor [patches, {config.patch_dim}], got {got}")
    shape = list(pixel_values.shape)
    if len(shape) != 2 or shape[1] != config.patch_dim:
        hint = "; for whole images use encode(), which cuts them into patches" if len(shape) in (3, 4, 5) else ""
        raise ValueError(
            f"pixel_values: expected [patches, {config.patch_dim}] (channels x frames x height x width of a patch), "
            f"got {shape}{hint}"
        )
    if shape[0] != grid.patches:
        more = f" and {len(grid.tensor) - 8} more" if len(grid.tensor) > 8 else ""
        raise ValueError(
            f"pixel_values: grid_thw {grid.tensor[:8].tolist()}{more} describes {grid.patches} patches, got {shape[0]}"
        )
