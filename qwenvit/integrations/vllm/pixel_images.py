"""transformers' image processors of Qwen-VL models, up to the point where they would resize: they return bytes."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwenvit.integrations.vllm.pixel_rule import RGB, RGB_SIZE, PixelRule


class _RgbImages:
    """In front of one of transformers' image processors: convert images to RGB as it does, and return their bytes.

    Everything before is transformers': which options a call has, and how transparency, palettes and 16 bits become RGB.
    A call whose pixel values `rule` does not reproduce is transformers' as a whole, and so is one with an image that
    is not three channels of bytes on the CPU, or whose bytes are more than those of its pixel values: vLLM's limits
    know images after resizing alone.
    """

    rule: PixelRule

    def process_image(self, image: Any, *args: Any, **options: Any) -> Any:
        """Convert an image to RGB. Copy memory of the caller, who may write to it before the bytes are used."""
        prepared = super().process_image(image, *args, **options)  # type: ignore[misc]
        if isinstance(image, Image.Image):
            return prepared  # a copy already
        return prepared.clone() if isinstance(prepared, Tensor) else prepared.copy()

    def _preprocess(self, images: Sequence[Tensor | NDArray[Any]], *args: Any, **settings: Any) -> BatchFeature:
        """Return the bytes, sizes and grids of images `[3, height, width]`."""
        size = settings.get("size")
        bounds = [getattr(size, edge, None) for edge in ("shortest_edge", "longest_edge")]
        known = not args and all(bounds) and self.rule.settings.keys() <= settings.keys()
        if not known or self.rule.obstacle(settings) or not all(map(_is_rgb, images)):
            return super()._preprocess(images, *args, **settings)  # type: ignore[misc]
        frames = [torch.as_tensor(image).permute(1, 2, 0) for image in images]  # as Pillow has them in memory
        sizes = [frame.shape[:2] for frame in frames]
        grids = [self.rule.grid_for(*size, *bounds) for size in sizes]
        rgb = [frame.reshape(-1) for frame in frames]
        if any(one.nbytes > self.rule.num_bytes(grid) for one, grid in zip(rgb, grids, strict=True)):
            return super()._preprocess(images, *args, **settings)  # type: ignore[misc]
        return BatchFeature(
            {
                RGB: rgb[0] if len(rgb) == 1 else torch.cat(rgb),
                RGB_SIZE: torch.tensor(sizes),
                "image_grid_thw": torch.tensor(grids),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Describe transformers' processor."""
        described: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        described.pop("rule", None)  # of qwenvit, and not set yet where from_dict calls this
        return described


class RgbImagesTorch(_RgbImages, Qwen2VLImageProcessor):  # type: ignore[misc]  # takes settings by name alone
    """`Qwen2VLImageProcessor` that returns bytes."""


class RgbImagesPillow(_RgbImages, Qwen2VLImageProcessorPil):  # type: ignore[misc]
    """`Qwen2VLImageProcessorPil` that returns bytes."""


def _is_rgb(image: Tensor | NDArray[Any]) -> bool:
    if isinstance(image, Tensor):
        eight_bit = image.dtype == torch.uint8 and image.device.type == "cpu"
    else:
        eight_bit = image.dtype == np.uint8
    return eight_bit and image.ndim == 3 and image.shape[0] == 3 and 0 not in image.shape


@lru_cache(maxsize=8)
def returning_bytes(processor: Any, rule: PixelRule) -> Any:
    """Return a copy of transformers' processor whose image processor returns bytes; the rest is shared."""
    kind = RgbImagesPillow if rule.processor.resize == "pillow" else RgbImagesTorch
    images = cast(Any, kind).from_dict(processor.image_processor.to_dict())
    images.rule = rule
    copied = copy.copy(processor)
    copied.image_processor = images
    return copied
