"""The stages from a file to `pixel_values` on the tower's device, one by one."""

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from common.timing import gpu_seconds, wall_seconds
from qwenvit import Encoder
from qwenvit.preprocess.batching import PATCHES_PER_BATCH
from qwenvit.preprocess.prefetch import check_num_workers

DECODING_THREADS = check_num_workers(None)
"""Threads that `encode` decodes with by default."""
SAMPLES, REPEATS = 24, 3
"""Images of a folder whose stages are timed, and how often each."""


def decode(path: Path) -> NDArray[np.uint8]:
    """Decode an image file with Pillow to `[H, W, 3]`."""
    return np.asarray(Image.open(path).convert("RGB"))


def preprocess(encoder: Encoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Resize, normalise and cut one image where it is.

    Args:
        encoder: whose image processor, device and dtype.
        image: `[3, H, W]` uint8 on the encoder's device, with any strides.

    Returns:
        `pixel_values` in the tower's dtype on its device, and the grid `[1, 3]`.
    """
    return encoder.image_processor(image, channels="first", device=encoder.device, dtype=encoder.dtype)


def on_device(encoder: Encoder, image: NDArray[np.uint8]) -> Tensor:
    """Return a decoded image `[H, W, 3]` as `[3, H, W]` on the encoder's device."""
    return torch.tensor(image).to(encoder.device).permute(2, 0, 1)


def tower_batches(encoder: Encoder, paths: Sequence[Path]) -> list[tuple[Tensor, Tensor]]:
    """Return the batches that `encode` makes of images: `pixel_values` on the tower's device in its dtype, and grids.

    Consecutive images share a batch of at most `PATCHES_PER_BATCH` patches. The pixel values are computed on the CPU,
    whichever way `encode` computes them.
    """

    def prepare(path: Path) -> tuple[Tensor, Tensor]:
        pixels, grid = encoder.image_processor(path)
        return pixels.to(encoder.device, encoder.dtype), grid

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        images = list(pool.map(prepare, paths))
    groups: list[list[tuple[Tensor, Tensor]]] = []
    patches = PATCHES_PER_BATCH
    for pixels, grid in images:
        if patches + len(pixels) > PATCHES_PER_BATCH:
            groups, patches = [*groups, []], 0
        groups[-1].append((pixels, grid))
        patches += len(pixels)
    return [(torch.cat([pixels for pixels, _ in group]), torch.cat([grid for _, grid in group])) for group in groups]


def video_batches(pixels: Tensor, grid: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut a video's `pixel_values` and its grid `[1, 3]` into batches of whole frame groups.

    A batch has at most `PATCHES_PER_BATCH` patches, or one frame group. Frame groups do not see one another.
    """
    groups, rows, columns = grid[0].tolist()
    most = max(1, PATCHES_PER_BATCH // (rows * columns))
    sizes = [min(most, groups - start) for start in range(0, groups, most)]
    parts = pixels.split([size * rows * columns for size in sizes])
    return [(part, torch.tensor([[size, rows, columns]])) for part, size in zip(parts, sizes, strict=True)]


def sample_by_area(paths: Sequence[Path], count: int) -> list[Path]:
    """Return at most `count` of the images, evenly spaced from the smallest to the largest.

    Their mean size is close to that of all images.
    """

    def area(path: Path) -> int:
        with Image.open(path) as image:  # reads the header alone
            return image.width * image.height

    ordered, count = sorted(paths, key=area), min(count, len(paths))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def stage_seconds(encoder: Encoder, paths: Sequence[Path]) -> dict[str, float]:
    """Return the mean seconds an image of each stage before the tower, over a sample of a folder.

    Returns:
        `decode`: in one thread; `copy`: from pinned memory to the GPU, and `preprocess`: both by CUDA events.
    """
    found: dict[str, list[float]] = {"decode": [], "copy": [], "preprocess": []}
    for path in sample_by_area(paths, SAMPLES):
        found["decode"].append(decode_seconds(path))
        pixels = torch.tensor(decode(path))
        host = pixels.pin_memory() if torch.cuda.is_available() else pixels
        image = on_device(encoder, pixels.numpy())
        preprocess(encoder, image)  # compiles
        found["copy"].append(gpu_seconds(lambda: host.to(encoder.device, non_blocking=True), REPEATS))  # noqa: B023
        found["preprocess"].append(gpu_seconds(lambda: preprocess(encoder, image), REPEATS))  # noqa: B023
    return {name: statistics.mean(seconds) for name, seconds in found.items()}


def decode_seconds(path: Path, repeats: int = REPEATS) -> float:
    """Return the median seconds of decoding a file in one thread."""
    return statistics.median(wall_seconds(lambda: decode(path)) for _ in range(repeats))


def preprocessing_figures(encoder: Encoder, path: Path, bandwidth: float) -> dict[str, Any]:
    """Time the preprocessing of one image that is on the GPU already.

    Args:
        encoder: whose image processor.
        path: the image.
        bandwidth: bytes a second of a device copy.

    Returns:
        `seconds` by CUDA events; `bytes` that have to be read and written; `floor`: the seconds to move them.
    """
    image = on_device(encoder, decode(path))
    pixels, _ = preprocess(encoder, image)
    moved = image.nbytes + pixels.nbytes
    seconds = gpu_seconds(lambda: preprocess(encoder, image), repeats=20)
    return {"seconds": seconds, "bytes": moved, "floor": moved / bandwidth}
