"""Checks of what a tower is called with: pixel values and their grids."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig

MOST_PATCHES = 2**31 - 1
"""`cu_seqlens` are 32-bit integers, here as in every attention kernel that takes them."""


def check_grid(grid_thw: Tensor | Sequence[Sequence[int]], spatial_merge_size: int) -> tuple[Tensor, int]:
    """`grid_thw` as `[items, 3]` int64 on the CPU, and its patches; or a ValueError that says what is wrong with it."""
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
    return grid, _count_patches(grid, spatial_merge_size)


def _count_patches(grid: Tensor, spatial_merge_size: int) -> int:
    """Grids come again and again, and looking one through took a twentieth of a small image's time on the GPU (140 µs
    of a host that had been busy with other things): so the answer is kept.
    """
    rows = grid.numpy()  # whose small operations take a fraction of torch's time
    if torch.compiler.is_compiling():  # Dynamo looks into the cache and does not know bytes
        return _count(rows, spatial_merge_size)
    return _count_once(rows.tobytes(), spatial_merge_size)


@lru_cache(maxsize=1024)
def _count_once(grid: bytes, spatial_merge_size: int) -> int:
    return _count(np.frombuffer(grid, dtype=np.int64).reshape(-1, 3), spatial_merge_size)


def _count(rows: np.ndarray, spatial_merge_size: int) -> int:
    # In floating point, where the product of absurd sizes does not wrap around to a harmless number.
    if (patches := float(rows.astype(np.float64).prod(1).sum())) > MOST_PATCHES:
        raise ValueError(f"grid_thw: expected at most {MOST_PATCHES} patches in a batch, got {patches:.3g}")
    if rows.min() < 1 or (rows[:, 1:] % spatial_merge_size).any():
        bad = (rows < 1).any(1) | (rows[:, 1:] % spatial_merge_size != 0).any(1)
        item = int(bad.argmax())
        raise ValueError(
            f"grid_thw: expected positive sizes, rows and columns multiples of {spatial_merge_size}; "
            f"item {item} is {rows[item].tolist()}"
        )
    return int(patches)


def check_pixel_values(pixel_values: Tensor, grid: Tensor, patches: int, config: VisionConfig) -> None:
    """Refuse anything but `[patches, C·T·P·P]` floats, as many as the grids stand for."""
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
    if shape[0] != patches:
        more = f" and {len(grid) - 8} more" if len(grid) > 8 else ""
        raise ValueError(
            f"pixel_values: grid_thw {grid[:8].tolist()}{more} stands for {patches} patches, got {shape[0]}"
        )
