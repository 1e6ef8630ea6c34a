"""What the image and the video processor share: their settings, cutting frames into patches, normalising."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from qwenvit.preprocess.decode import Backend
from qwenvit.preprocess.resize import bounds_from_size

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Qwen2 and Qwen2.5
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STANDARD_MEAN = (0.5, 0.5, 0.5)  # Qwen3 and later
IMAGENET_STANDARD_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PatchProcessor:
    """Base of the image and video processors: patch sizes, pixel bounds, mean and standard deviation.

    The defaults are those of transformers' `Qwen2VLImageProcessor`; `for_family` returns those of published models.

    Raises:
        ValueError: an impossible value; the message names the field and what was expected.
    """

    patch_size: int = 14
    """Side of a patch in pixels."""
    temporal_patch_size: int = 2
    """Frames in a patch; an image is repeated to fill it."""
    merge_size: int = 2
    """Side of a merged token in patches."""
    min_pixels: int = 56 * 56
    """Least area after resizing."""
    max_pixels: int = 28 * 28 * 1280
    """Largest area after resizing."""
    image_mean: tuple[float, float, float] = OPENAI_CLIP_MEAN
    """Mean of red, green and blue, for values in [0, 1]."""
    image_std: tuple[float, float, float] = OPENAI_CLIP_STD
    """Standard deviation of red, green and blue, for values in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}; pass both")
        for name, low in (("image_mean", -math.inf), ("image_std", 0.0)):
            value = getattr(self, name)
            numbers = isinstance(value, tuple) and all(isinstance(v, int | float) for v in value)
            if not numbers or len(value) != 3 or not all(low < v < math.inf for v in value):
                raise ValueError(f"{name}: expected three numbers{' above 0' if low == 0 else ''}, got {value!r}")

    @property
    def factor(self) -> int:
        """Side of a merged token in pixels."""
        return self.patch_size * self.merge_size

    def with_bounds(
        self, min_pixels: int | None = None, max_pixels: int | None = None, size: Mapping[str, int] | None = None
    ) -> Self:
        """Return a copy of the processor with other pixel bounds; a bound of None is unchanged.

        Args:
            min_pixels: lower bound of the area after resizing.
            max_pixels: upper bound of the area after resizing.
            size: both bounds as Hugging Face writes them, `{"shortest_edge": min_pixels, "longest_edge": max_pixels}`.

        Raises:
            ValueError: unknown keys, `size` and pixels that disagree, a lower bound above the upper.
        """
        bounds: dict[str, Any] = bounds_from_size(size)
        for key, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and bounds.setdefault(key, value) != value:
                raise ValueError(f"{key}: expected what size says, {bounds[key]}, got {value}; pass only one")
        # to_hf() writes the bounds as JSON, which has no NumPy integers.
        python_bounds: dict[str, Any] = {
            key: value.item() if isinstance(value, np.integer) else value for key, value in bounds.items()
        }
        return replace(self, **python_bounds)

    def patchify(self, frames: Tensor) -> Tensor:
        """Cut frames `[T, C, H, W]` into `[patches, C, temporal_patch_size · patch_size²]`, in merge-block order.

        einops is a dependency for this one permute, whose pattern shows the order of patches.
        """
        return rearrange(
            frames,
            "(t tp) c (h mh ph) (w mw pw) -> (t h w mh mw) c (tp ph pw)",
            tp=self.temporal_patch_size,
            mh=self.merge_size,
            mw=self.merge_size,
            ph=self.patch_size,
            pw=self.patch_size,
        )

    def normalise(self, patches: Tensor, backend: Backend) -> Tensor:
        """Normalise `[patches, C, values]` to `[patches, C · values]` float32, `(x - mean) / std` per channel.

        For uint8 patches `"pillow"` divides the values by 255 first. `"torch"` multiplies mean and deviation by 255
        instead, as transformers does, which rounds differently in the last bit.
        """
        values = patches.to(torch.float32, copy=True)  # patches may be a view of the user's image
        mean, std = values.new_tensor((self.image_mean, self.image_std))[..., None]
        if patches.dtype == torch.uint8:
            if backend == "pillow":
                values.div_(255)
            else:
                mean, std = mean * 255, std * 255
        return values.sub_(mean).div_(std).flatten(1)

    def pixel_values(self, frames: Tensor, backend: Backend) -> Tensor:
        """Cut resized frames `[T, 3, H, W]` into normalised patches `[patches, C·T·P·P]` float32."""
        return self.normalise(self.patchify(frames), backend)  # permute bytes, a quarter of the memory of float32
