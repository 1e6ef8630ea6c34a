"""Pictures of noise in every mode, for the processors that a plugin of vLLM has."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def noise(*shape: int) -> NDArray[np.uint8]:
    """Return bytes that depend on the shape alone."""
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Return an image of one of Pillow's modes, or a palette with a transparent colour for `"transparent"`."""
    image = Image.fromarray(noise(height, width, 3))
    match mode:
        case "I;16":
            return Image.fromarray(noise(height, width).astype(np.uint16) * 200)
        case "RGBA" | "LA":
            image = image.convert(mode)
            image.putalpha(Image.fromarray(noise(height, width)))
            return image
        case "transparent":
            image = image.convert("P")
            image.info["transparency"] = 3
            return image
    return image.convert(mode)
