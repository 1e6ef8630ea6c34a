"""How a checkpoint's image processor turns RGB bytes into pixel values, and where those of a batch are computed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwenvit.preprocess.decode import Backend
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.resize import smart_resize

RGB, RGB_SIZE = "image_rgb", "image_rgb_size"
"""Fields of an image whose bytes travel: `[Σ height · width · 3]` uint8, and `[images, 2]`, height and width."""

_BICUBIC = 3  # Pillow's number, which transformers uses for torchvision too
_RESIZES_AS: dict[str, Backend] = {
    "transformers.models.qwen2_vl.image_processing_qwen2_vl.Qwen2VLImageProcessor": "torch",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil": "pillow",
}


@dataclass(frozen=True)
class PixelRule:
    """What the tower's side needs in order to compute the pixel values of images from their bytes."""

    processor: ImageProcessor
    """Patch sizes, mean, standard deviation and whose resizing; not the pixel bounds, which a request may change."""
    dtype: torch.dtype
    """The model's, or uint8 where vLLM's tower normalises: then pixel values are bytes."""

    @property
    def settings(self) -> dict[str, Any]:
        """The options of transformers' image processor that give these pixel values."""
        normalises = self.dtype != torch.uint8
        fixed = {"do_resize": True, "resample": _BICUBIC, "rescale_factor": 1 / 255}
        fixed |= {"do_rescale": normalises, "do_normalize": normalises}
        fields = ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
        return fixed | {name: getattr(self.processor, name) for name in fields}

    def obstacle(self, options: Mapping[str, Any]) -> str | None:
        """Return which of the options given gives other pixel values; None if none does."""
        for name, expected in self.settings.items():
            given = options.get(name, expected)
            if (tuple(given) if isinstance(given, list) else given) != expected:
                return f"{name}: expected {expected!r}, got {given!r}"
        return None

    def grid_for(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int, int]:
        """Return the grid `(1, rows, columns)` of patches of an image.

        Raises:
            ValueError: no pixels, or an aspect ratio above 200.
        """
        patch_size = self.processor.patch_size
        height, width = smart_resize(height, width, self.processor.factor, min_pixels, max_pixels)
        return 1, height // patch_size, width // patch_size

    def num_bytes(self, grid: Sequence[int]) -> int:
        """Return the bytes of an image's pixel values."""
        return math.prod(grid) * self.processor.patch_dim * self.dtype.itemsize

    def pixel_values(self, rgb: Tensor, sizes: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Resize images, normalise them and cut them into patches, on the device of their bytes.

        Args:
            rgb: the bytes of all images, one after another, `[Σ height · width · 3]`.
            sizes: `[images, 2]` on the CPU: height and width.
            grids: of each image: 1, rows and columns of patches.

        Returns:
            `[patches, C·T·P·P]` in `dtype`.
        """
        patches = [frames * rows * columns for frames, rows, columns in grids]
        out = rgb.new_empty((sum(patches), self.processor.patch_dim), dtype=self.dtype)
        images = rgb.split((sizes.prod(1) * 3).tolist())
        for image, size, (_, rows, columns), values in zip(
            images, sizes.tolist(), grids, out.split(patches), strict=True
        ):
            frames = image.view(1, *size, 3).permute(0, 3, 1, 2)
            self.processor.write_patches(frames, (1, rows, columns), self.processor.resize, values)
        return out


def select_images(rgb: Tensor, sizes: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the bytes and the sizes of some images."""
    images = rgb.split((sizes.prod(1) * 3).tolist())
    chosen = [images[index] for index in indices]
    return torch.cat(chosen) if chosen else rgb[:0], sizes[list(indices)]


def read_rule(image_processor: Any, dtype: torch.dtype) -> PixelRule:
    """Return the rule of transformers' `Qwen2VLImageProcessor`, or of `Qwen2VLImageProcessorPil`.

    Raises:
        ValueError: another class, or settings whose pixel values are not reproduced.
    """
    kind = type(image_processor)
    resize = _RESIZES_AS.get(f"{kind.__module__}.{kind.__qualname__}")
    if resize is None:
        expected = "transformers' Qwen2VLImageProcessor or Qwen2VLImageProcessorPil"
        raise ValueError(f"image processor: expected {expected}, got {kind.__module__}.{kind.__qualname__}")
    described = replace(ImageProcessor.from_hf(image_processor.to_dict()), resize=resize)
    return PixelRule(described, dtype)
