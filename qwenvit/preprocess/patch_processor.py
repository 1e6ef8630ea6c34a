"""From frames to patches: the size rule, resizing, cutting and normalising, once for images and videos."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from qwenvit.preprocess.decode import Backend
from qwenvit.preprocess.resize import size_bounds

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and deviation of Qwen3 and later


@dataclass(frozen=True)
class PatchProcessor:
    """What the processors of images and videos have in common: patch sizes, pixel bounds, mean and deviation.

    The defaults are those of transformers' `Qwen2VLImageProcessor`; `for_family` gives those of published models.

    Raises:
        ValueError: a value no processor could have, named with what was expected.
    """

    patch_size: int = 14
    """Side of a patch in pixels."""
    temporal_patch_size: int = 2
    """Frames in a patch; an image stands for that many equal frames."""
    merge_size: int = 2
    """Patches along each side of a merged token."""
    min_pixels: int = 56 * 56
    """Least area after resizing."""
    max_pixels: int = 28 * 28 * 1280
    """Largest area after resizing."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of red, green and blue, of values in [0, 1]."""
    image_std: tuple[float, float, float] = CLIP_STD
    """Standard deviation of red, green and blue."""

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
        """The same processor with other pixel bounds; what is not given stays.

        Args:
            min_pixels: least area.
            max_pixels: largest area.
            size: the same as Hugging Face writes it: `{"shortest_edge": area, "longest_edge": area}`.

        Raises:
            ValueError: unknown keys, `size` and pixels that disagree, a lower bound above the upper.
        """
        bounds: dict[str, Any] = size_bounds(size)
        for key, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and bounds.setdefault(key, value) != value:
                raise ValueError(f"{key}: expected what size says, {bounds[key]}, got {value}; pass only one")
        plain: dict[str, Any] = {
            key: value.item() if isinstance(value, np.integer) else value for key, value in bounds.items()
        }
        return replace(self, **plain)

    def patchify(self, frames: Tensor) -> Tensor:
        """Cut `[T, C, H, W]` into `[patches, C, temporal_patch_size · patch_size²]`, in merge-block order."""
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
        """Bring `[patches, C, values]` to mean 0 and deviation 1: `[patches, C · values]` float32.

        Bytes are scaled to [0, 1] on the way: `"pillow"` divides them first, `"torch"` scales mean and deviation
        instead, which rounds differently in the last bit.
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
        """Patches of resized frames `[T, 3, H, W]`: `[patches, C·T·P·P]` float32."""
        return self.normalise(self.patchify(frames), backend)  # cut as bytes: a quarter of the memory to move
