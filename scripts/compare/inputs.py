"""The inputs of `compare_hf.py`: image files, or synthetic images and a synthetic video."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from qwenvit import Encoder

AWKWARD_SIZES = ((448, 448), (1, 1), (30, 1000), (1003, 57), (333, 777), (512, 640))  # height x width
KINDS = {"batch": "of images of awkward sizes", "image": "of 448 x 448 alone", "video": "of five frames"}
FRAMES = 5
"""Odd, so that the video processor has to repeat the last frame."""


class TowerInputs(NamedTuple):
    """Pixel values `[patches, C·T·P·P]`, grid `[items, 3]`, and a name for each item."""

    pixel_values: Tensor
    grid: Tensor
    names: list[str]


def load_inputs(encoder: Encoder, files: Sequence[Path], kind: str, max_pixels: int | None) -> TowerInputs:
    """Preprocess image files, or synthetic inputs of a kind where there are no files, by the encoder's processors."""
    if kind == "video":
        frames = [synthetic_image(336, 504, seed) for seed in range(FRAMES)]
        return TowerInputs(*encoder.video_processor(frames, max_pixels=max_pixels), ["synthetic video"])
    sizes = AWKWARD_SIZES[:1] if kind == "image" else AWKWARD_SIZES
    images: list[Path] | list[Image.Image] = list(files) or [synthetic_image(*size) for size in sizes]
    names = [file.name for file in files] or [f"synthetic {height}x{width}" for height, width in sizes]
    return TowerInputs(*encoder.image_processor(images, max_pixels=max_pixels), names)


def synthetic_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return a smooth colour image, seeded."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
