"""What `compare_hf.py` feeds the towers: files, or synthetic pictures and a video."""

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
"""An odd number: the last one is repeated."""


class Inputs(NamedTuple):
    """Pixel values and grids, and what each item is called."""

    pixel_values: Tensor
    grid: Tensor
    names: list[str]


def load_inputs(encoder: Encoder, files: Sequence[Path], kind: str, max_pixels: int | None) -> Inputs:
    """Images from files, or else synthetic ones of a kind, by the encoder's own processors."""
    if kind == "video":
        frames = [synthetic(336, 504, seed) for seed in range(FRAMES)]
        return Inputs(*encoder.video_processor(frames, max_pixels=max_pixels), ["synthetic video"])
    sizes = AWKWARD_SIZES[:1] if kind == "image" else AWKWARD_SIZES
    pictures: list[Path] | list[Image.Image] = list(files) or [synthetic(*size) for size in sizes]
    names = [file.name for file in files] or [f"synthetic {height}x{width}" for height, width in sizes]
    return Inputs(*encoder.image_processor(pictures, max_pixels=max_pixels), names)


def synthetic(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture in colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
