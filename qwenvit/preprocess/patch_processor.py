"""What the image and the video processor share: their settings, cutting frames into patches, normalising."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from qwenvit import ops
from qwenvit.ops.checks import FLOATING, check, check_floating
from qwenvit.ops.reference import cut_patches, join_patches
from qwenvit.plan.inputs import check_grid
from qwenvit.preprocess.decode import Backend
from qwenvit.preprocess.resize import (
    bounds_from_size,
    bytes_from_floats,
    pillow_resizes_height_first,
    resize_frames,
)

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Qwen2 and Qwen2.5
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STANDARD_MEAN = (0.5, 0.5, 0.5)  # Qwen3 and later
IMAGENET_STANDARD_STD = (0.5, 0.5, 0.5)
Channels = tuple[float, float, float]
"""Numbers of red, green and blue."""


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
    image_mean: Channels = OPENAI_CLIP_MEAN
    """Mean of red, green and blue, for values in [0, 1]."""
    image_std: Channels = OPENAI_CLIP_STD
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

    @property
    def patch_dim(self) -> int:
        """Values of a patch, C·T·P·P."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def with_bounds(
        self, min_pixels: int | None = None, max_pixels: int | None = None, size: Mapping[str, int] | None = None
    ) -> Self:
        """Return a copy of the processor with other pixel bounds; a bound of None is unchanged.

        An upper bound alone that is below the processor's own lower bound lowers that too.

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
        if "max_pixels" in python_bounds and "min_pixels" not in python_bounds:
            upper = replace(self, min_pixels=1, max_pixels=python_bounds["max_pixels"]).max_pixels  # checks it
            python_bounds["min_pixels"] = min(self.min_pixels, upper)
        return replace(self, **python_bounds)

    def new_pixel_values(self, patches: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Allocate `[patches, C·T·P·P]`.

        Raises:
            ValueError: not a dtype that pixel values can have.
        """
        check(dtype in FLOATING, "dtype", "float32, bfloat16 or float16", dtype)
        return torch.empty(patches, self.patch_dim, device=device, dtype=dtype)

    def pixel_values(self, frames: Tensor, backend: Backend) -> Tensor:
        """Cut resized frames `[T, 3, H, W]` into normalised patches `[patches, C·T·P·P]` float32."""
        # Permute bytes: they are a quarter of the memory of float32.
        patches = cut_patches(frames, self.patch_size, self.temporal_patch_size, self.merge_size)
        return _normalise(patches, self.image_mean, self.image_std, backend)

    def write_patches(self, frames: Tensor, grid: tuple[int, int, int], backend: Backend, out: Tensor) -> None:
        """Resize frames, normalise them and cut them into patches, on the device of the frames.

        With `out` of uint8, the bytes are not normalised.

        The values of 8-bit frames on a GPU equal those on a CPU to the last bit: Pillow's, or those of torch's 8-bit
        kernels for x86 with AVX2 or AVX-512 and without, which agree; other CPUs were not compared.

        Args:
            frames: `[F, 3, H, W]` uint8, or float32 in [0, 1]. The last is repeated to fill its group.
            grid: groups of frames, rows and columns of patches.
            backend: whose resizing and normalisation.
            out: `[patches, C·T·P·P]` in any floating dtype, or uint8 for 8-bit frames, on the device of the frames.
        """
        height, width = grid[1] * self.patch_size, grid[2] * self.patch_size
        if frames.is_floating_point() and backend == "pillow":
            frames = bytes_from_floats(frames)
        if frames.is_cuda and not frames.is_floating_point():
            # The kernel writes floats; bfloat16 represents every byte exactly.
            values = out if out.is_floating_point() else torch.empty_like(out, dtype=torch.bfloat16)
            normalise_as = backend if out.is_floating_point() else None
            ops.resize_patches(
                frames,
                height,
                width,
                _levels(self.image_mean, self.image_std, normalise_as, values.dtype, values.device),
                rule=backend,
                vertical_first=backend == "pillow" and pillow_resizes_height_first(frames.shape[2:], (height, width)),
                patch_size=self.patch_size,
                temporal_patch_size=self.temporal_patch_size,
                merge_size=self.merge_size,
                out=values,
            )
            if values is not out:
                out.copy_(values)
            return
        resized = self.resized_groups(frames, grid, backend)
        if out.is_floating_point():
            out.copy_(self.pixel_values(resized, backend))
        else:
            out.copy_(cut_patches(resized, self.patch_size, self.temporal_patch_size, self.merge_size).flatten(1))

    def resized_groups(self, frames: Tensor, grid: tuple[int, int, int], backend: Backend) -> Tensor:
        """Resize frames `[F, 3, H, W]` to a grid, and repeat the last one to fill its group."""
        resized = resize_frames(frames, grid[1] * self.patch_size, grid[2] * self.patch_size, backend)
        missing = grid[0] * self.temporal_patch_size - len(resized)
        return torch.cat((resized, resized[-1:].expand(missing, -1, -1, -1))) if missing else resized

    def unpatchify(
        self, pixel_values: Tensor, grid_thw: Tensor | Sequence[Sequence[int]], *, denormalize: bool = True
    ) -> list[Tensor]:
        """Put patches together to the resized frames that they were cut from. Gradients flow through it.

        Args:
            pixel_values: `[patches, C·T·P·P]` float32, bfloat16 or float16, in merge-block order, as a processor
                returns them, or other values of the same shape, such as their gradients.
            grid_thw: `[items, 3]` integers: groups of frames, rows and columns of patches of each item.
            denormalize: multiply by `image_std` and add `image_mean`, so that normalised pixels are in [0, 1] again
                (bicubic interpolation of floats overshoots it at sharp edges). False for gradients.

        Returns:
            `[frames, 3, height, width]` float32 of each item, on the device of `pixel_values`. The frames that were
            repeated to fill the last group are among them.

        Raises:
            TypeError: `pixel_values` is not a floating tensor.
            ValueError: shapes that do not fit the processor or each other.
        """
        check_floating("pixel_values", pixel_values, f"[patches, {self.patch_dim}]")
        grids = check_grid(grid_thw, self.merge_size)
        expected, shape = [grids.patches, self.patch_dim], list(pixel_values.shape)
        check(shape == expected, "pixel_values", f"{expected} for these grids", shape)
        patches = pixel_values.float().unflatten(1, (3, -1))
        if denormalize:
            means, deviations = patches.new_tensor((self.image_mean, self.image_std))[..., None]
            patches = patches * deviations + means
        sides = (self.patch_size, self.temporal_patch_size, self.merge_size)
        items = patches.split(grids.tensor.prod(1).tolist())
        return [join_patches(item, grid, *sides) for item, grid in zip(items, grids.tensor.tolist(), strict=True)]


def _normalise(patches: Tensor, mean: Channels, std: Channels, backend: Backend) -> Tensor:
    """Normalise `[patches, C, values]` to `[patches, C · values]` float32, `(x - mean) / std` per channel.

    For uint8 patches `"pillow"` divides the values by 255 first. `"torch"` multiplies mean and deviation by 255
    instead, as transformers does, which rounds differently in the last bit.
    """
    values = patches.to(torch.float32, copy=True)  # patches may be a view of the user's image
    means, deviations = values.new_tensor((mean, std))[..., None]
    if patches.dtype == torch.uint8:
        if backend == "pillow":
            values.div_(255)
        else:
            means, deviations = means * 255, deviations * 255
    return values.sub_(means).div_(deviations).flatten(1)


@lru_cache(maxsize=64)
def _levels(mean: Channels, std: Channels, backend: Backend | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the normalised value of each byte, `[3, 256]`, on the device; the bytes themselves if backend is None."""
    with torch.inference_mode(False):  # the cached tensor is for every caller
        every_byte = torch.arange(256, dtype=torch.uint8, device="cpu").expand(1, 3, -1)
        if backend is None:
            levels = every_byte[0].to(device, dtype).contiguous()
        else:
            levels = _normalise(every_byte, mean, std, backend).unflatten(1, (3, 256))[0].to(device, dtype)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # callers may be on any stream
    return levels
