"""The size an image is resized to, and resizing."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qwenvit.preprocess.decode import Backend

MAX_ASPECT_RATIO = 200


SIZE_KEYS = {
    "shortest_edge": "min_pixels",  # areas, whatever Hugging Face calls them
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
    """The size an image or frame is resized to: multiples of `factor` within an area, close to its aspect ratio.

    Sides are rounded to the nearest multiple (halves to even). Where `frames · height · width` then lies outside
    the bounds, the sides as given are scaled to the bound and rounded down (never below `factor`), or up.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        factor: pixels a merged token spans, `patch_size · merge_size`.
        min_pixels: lower bound of the area.
        max_pixels: upper bound of the area.
        num_frames: frames that share the area: 1 for images and Qwen2's videos.
        temporal_factor: the frame count is rounded to a multiple of it for comparing with the bounds.

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
    """Resize `[T, 3, H, W]` by bicubic interpolation with antialiasing.

    `"pillow"` gives uint8 and takes float32 frames in [0, 1] down to 8 bits first, as transformers does (but for
    frames of zeros and ones alone, which transformers takes for bytes). `"torch"` keeps the dtype; its float results
    overshoot [0, 1] at sharp edges. Bytes of the two differ by up to 2 levels.
    """
    if backend == "torch":
        if frames.shape[2:] == (height, width):
            return frames
        return F.interpolate(frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    if frames.is_floating_point():
        frames = (frames.double() * 255).float().to(torch.uint8)
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames.permute(0, 2, 3, 1).contiguous().numpy()):
        resized[index] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def size_bounds(size: Mapping[str, Any] | None) -> dict[str, int]:
    """The pixel bounds in a `size` of either spelling.

    Raises:
        ValueError: a key that is not a bound, or two spellings that disagree.
    """
    bounds: dict[str, int] = {}
    if size is not None and not isinstance(size, Mapping):
        raise ValueError(f"size: expected a mapping of {sorted(SIZE_KEYS)}, got {size!r}")
    for key, value in (size or {}).items():
        if key not in SIZE_KEYS:
            raise ValueError(f"size: expected keys among {sorted(SIZE_KEYS)}, got {key!r}")
        if value is not None and bounds.setdefault(SIZE_KEYS[key], value) != value:
            raise ValueError(f"size: two spellings of one bound disagree: {dict(size or {})}")
    return bounds
