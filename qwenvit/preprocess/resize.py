"""Choosing the size to resize an image to, and resizing it by Pillow or torch: on the CPU, or floats on a GPU."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qwenvit.preprocess.decode import Backend

MAX_ASPECT_RATIO = 200
PILLOW_MAJOR = int(PIL.__version__.partition(".")[0])
SIZE_KEYS = {
    "shortest_edge": "min_pixels",  # an area, although Hugging Face calls it an edge
    "longest_edge": "max_pixels",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
}


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
    *,
    num_frames: int = 1,
    temporal_factor: int = 1,
) -> tuple[int, int]:
    """Return the `(height, width)` to resize an image or frame to: multiples of `factor`, close to its aspect ratio.

    Each side is rounded to the nearest multiple (halves to even). If `num_frames · height · width` is then above
    `max_pixels`, the original sides are scaled down to that area and rounded down, never below `factor`. If it is below
    `min_pixels`, they are scaled up and rounded up.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        factor: side of a merged token in pixels, `patch_size · merge_size`.
        min_pixels: lower bound of the area.
        max_pixels: upper bound of the area.
        num_frames: frames that share the area; 1 for images and for Qwen2's videos.
        temporal_factor: `num_frames` is rounded to a multiple of it before the area is compared with the bounds.

    Raises:
        ValueError: a side of zero, or one more than 200 times the other.

    Source: `smart_resize` of transformers 5.23's `qwen2_vl` and (with frames) `qwen3_vl`.
    """
    if min(height, width) < 1:
        raise ValueError(f"expected at least one pixel, got height {height} and width {width}")
    if (ratio := max(height, width) / min(height, width)) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {ratio:.1f} "
            f"(height {height}, width {width}); crop or pad it"
        )
    rows, columns = round(height / factor), round(width / factor)
    area = round(num_frames / temporal_factor) * temporal_factor * rows * columns * factor**2
    if area > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def resize_frames(frames: Tensor, height: int, width: int, backend: Backend) -> Tensor:
    """Resize frames `[T, 3, H, W]` by bicubic interpolation with antialiasing.

    `"pillow"` returns uint8. It converts float32 frames in [0, 1] to 8 bits first, as transformers does (except that
    transformers takes frames of only zeros and ones for bytes). `"torch"` keeps the dtype; float results overshoot
    [0, 1] at sharp edges.

    Both clamp to 8 bits between the horizontal and the vertical pass, and torch always runs the horizontal pass first.
    Where Pillow does too, their bytes differ by at most 2 of 255 levels. Pillow 13 runs the vertical pass first
    where the height shrinks by more than twice as many pixels as the width, as from 480 × 640 (height × width) to
    476 × 644: a quarter of random sizes at the models' default bounds. There they differ by up to 11 levels on the
    pictures in `scripts/pictures`, 27 on uniform noise and 31 on noise of black and white.
    """
    if backend == "torch":
        if frames.shape[2:] == (height, width):
            return frames
        if frames.shape[3] == 1:  # torch 2.13 reads wrong bytes where the strides of a single column are unusual
            frames = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device).copy_(frames)
        return F.interpolate(frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    if frames.is_floating_point():
        frames = bytes_from_floats(frames)
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames.permute(0, 2, 3, 1).contiguous().numpy()):
        resized[index] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def bytes_from_floats(frames: Tensor) -> Tensor:
    """Convert float32 frames in [0, 1] to uint8 as transformers' Pillow processor does, truncating."""
    return (frames.double() * 255).float().to(torch.uint8)


def pillow_resizes_height_first(size: Sequence[int], new_size: Sequence[int]) -> bool:
    """Return whether the installed Pillow resizes vertically first, from `(height, width)` to another.

    Source: `ImagingResampleInner` in Pillow 13's Resample.c, and before that `Image.resize`, for very tall images.
    """
    (height, width), (new_height, new_width) = size, new_size
    if PILLOW_MAJOR >= 13:
        return height > new_height and height - new_height > 2 * (width - new_width)
    return height > new_height and height > 100 * width


def bounds_from_size(size: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the `min_pixels` and `max_pixels` that a Hugging Face `size` states, under either of their names.

    Raises:
        ValueError: not a mapping, a key that is not a bound, or two names of one bound with different values.
    """
    bounds: dict[str, int] = {}
    if size is not None and not isinstance(size, Mapping):
        raise ValueError(f"size: expected a mapping of {sorted(SIZE_KEYS)}, got {size!r}")
    for key, value in (size or {}).items():
        if key not in SIZE_KEYS:
            raise ValueError(f"size: expected keys among {sorted(SIZE_KEYS)}, got {key!r}")
        if value is not None and bounds.setdefault(SIZE_KEYS[key], value) != value:
            raise ValueError(f"size: two names of one bound disagree: {dict(size or {})}")
    return bounds
