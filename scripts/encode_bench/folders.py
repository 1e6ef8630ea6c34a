"""The folders of JPEG files that `bench_encode.py` makes."""

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FULL_HD, PHOTOS, MIX = "1920×1080", "640×480", "mix of sizes"
SCIKIT_IMAGE_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
DRAWINGS = Path(__file__).parent.parent / "pictures"
QUALITY = 90
NOISE = 8.0
"""Standard deviation of the noise in levels. An enlarged photograph alone has no detail to decode."""


@dataclass(frozen=True)
class Folder:
    """A folder of JPEG files."""

    name: str
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each image in pixels."""
    rival_images: int
    """How many of the images transformers' processor receives: a sample from the smallest to the largest."""


def mixed_sizes(count: int, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """Return random widths and heights of 200 to 2000 pixels, uniform in their logarithm."""
    rng = random.Random(seed)

    def side() -> int:
        return round(math.exp(rng.uniform(math.log(200), math.log(2000))))

    return tuple((side(), side()) for _ in range(count))


FOLDERS = (
    Folder(FULL_HD, ((1920, 1080),) * 64, 16),
    Folder(PHOTOS, ((640, 480),) * 512, 32),
    Folder("4000×3000", ((4000, 3000),) * 16, 2),
    Folder(MIX, mixed_sizes(500), 32),
)
"""In the order they are measured: the mix last, when all kernels are compiled."""


def photographs() -> tuple[str, list[Image.Image]]:
    """Return pictures to enlarge and where they come from.

    scikit-image's photographs, or the drawings of this repository where it is not installed.
    """
    try:
        from skimage import data

        found = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in SCIKIT_IMAGE_PHOTOGRAPHS]
    except (ImportError, OSError):  # some versions download what they lack
        return "drawings", [Image.open(path).convert("RGB") for path in sorted(DRAWINGS.glob("*.png"))]
    return "photographs of scikit-image", found


def enlarge(picture: Image.Image, size: tuple[int, int], seed: int) -> Image.Image:
    """Return the middle of a picture in another size, with seeded noise."""
    pixels = np.asarray(ImageOps.fit(picture, size, Image.Resampling.BICUBIC), np.float32)
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, np.float32)
    return Image.fromarray((pixels + NOISE * noise).round().clip(0, 255).astype(np.uint8))


def make_folder(
    folder: Folder, parent: Path, pictures: Sequence[Image.Image], show: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Write the JPEG files of a folder, several at a time; return their paths in order.

    Args:
        folder: which files.
        parent: the folder is made in it.
        pictures: enlarged in turn.
        show: called with the progress after each file.
    """
    target = parent / folder.name.replace(" ", "_")
    target.mkdir()

    def write(index: int) -> Path:
        path = target / f"{index:04}.jpg"
        enlarge(pictures[index % len(pictures)], folder.sizes[index], seed=index).save(path, quality=QUALITY)
        return path

    paths = []
    with ThreadPoolExecutor() as pool:
        for path in pool.map(write, range(len(folder.sizes))):
            paths.append(path)
            show(f"making {folder.name}: {len(paths)}/{len(folder.sizes)}")
    return paths
