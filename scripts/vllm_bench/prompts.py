"""Requests with images for vLLM, made anew from a seed in every process."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"
"""How a prompt writes an image."""
Asked = tuple[Sequence[int], int]
"""The sides of a request's images, and its seed."""
COARSE, NOISE = 7, 20
"""Patches of colour along a picture's side, and the largest noise added to them, of 255 levels."""


def picture(side: int, seed: int) -> Image.Image:
    """Return a square picture: smooth colours with noise, a different one for every seed."""
    shifted = np.roll(_pixels(side), (37 * seed, 101 * seed), (0, 1))
    shifted[0, :3] = [[seed >> bits & 255] * 3 for bits in (0, 8, 16)]  # so that none repeats
    return Image.fromarray(shifted)


@cache
def _pixels(side: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(side)
    colours = Image.fromarray(rng.integers(0, 256, (COARSE, COARSE, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    return (smooth + rng.integers(-NOISE, NOISE, smooth.shape, np.int16)).clip(0, 255).astype(np.uint8)


def prompt(images: int) -> str:
    return f"<|im_start|>user\n{SHOWN * images}What is to be seen here?<|im_end|>\n<|im_start|>assistant\n"


def request(sides: Sequence[int], seed: int) -> dict[str, Any]:
    """Return vLLM's prompt with an image of each side; the images of other seeds differ."""
    images = [picture(side, 16 * seed + index) for index, side in enumerate(sides)]
    return {"prompt": prompt(len(sides)), "multi_modal_data": {"image": images}}
