"""From frames to patches: the size rule, resizing, cutting and normalising, once for images and videos."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from qwenvit.images import Backend

MAX_ASPECT_RATIO = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and deviation of Qwen3 and later
SIZE_KEYS = {
    "shortest_edge": "min_pixels",  # areas, whatever Hugging Face calls them
    "longest_edge": "max_pixels",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
}


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
    *,
    num_frames: int = 1,
    temporal_factor: int = 1,
) -> tuple[int, int]:
    """The size an image or frame is resized to: multiples of `factor` within an area, close to its aspect ratio.

    Sides are rounded to the nearest multiple (halves to even). Where `frames · height · width` then lies outside
    the bounds, the sides as given are scaled to the bound and rounded down (never below `factor`), or up.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        factor: pixels a merged token spans, `patch_size · merge_size`.
        min_pixels: lower bound of the area.
        max_pixels: upper bound of the area.
        num_frames: frames that share the area: 1 for images and Qwen2's videos.
        temporal_factor: the frame count is rounded to a multiple of it for comparing with the bounds.

    Raises:
        ValueError: a side of zero, or one more than 200 times the other.

    Source: `smart_resize` of transformers 5.23's `qwen2_vl` and (with frames) `qwen3_vl`.
    """
    if min(height, width) < 1:
        raise ValueError(f"expected at least one pixel, got height {height} and width {width}")
    if (ratio := max(height, width) / min(height, width)) > MAX_ASPECT_RATIO:
        raise ValueError(
            f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {ratio:.1f} "
            f"(height {height}, width {width}); crop or pad it"
        )
    rows, columns = round(height / factor), round(width / factor)
    area = round(num_frames / temporal_factor) * temporal_factor * rows * columns * factor**2
    if area > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def resize_frames(frames: Tensor, height: int, width: int, backend: Backend) -> Tensor:
    """Resize `[T, 3, H, W]` by bicubic interpolation with antialiasing.

    `"pillow"` gives uint8 and takes float32 frames in [0, 1] down to 8 bits first, as transformers does (but for
    frames of zeros and ones alone, which transformers takes for bytes). `"torch"` keeps the dtype; its float results
    overshoot [0, 1] at sharp edges. Bytes of the two differ by up to 2 levels.
    """
    if backend == "torch":
        if frames.shape[2:] == (height, width):
            return frames
        return F.interpolate(frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    if frames.is_floating_point():
        frames = (frames.double() * 255).float().to(torch.uint8)
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for index, frame in enumerate(frames.permute(0, 2, 3, 1).contiguous().numpy()):
        resized[index] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


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


def size_bounds(size: Mapping[str, Any] | None) -> dict[str, int]:
    """The pixel bounds in a `size` of either spelling.

    Raises:
        ValueError: a key that is not a bound, or two spellings that disagree.
    """
    bounds: dict[str, int] = {}
    if size is not None and not isinstance(size, Mapping):
        raise ValueError(f"size: expected a mapping of {sorted(SIZE_KEYS)}, got {size!r}")
    for key, value in (size or {}).items():
        if key not in SIZE_KEYS:
            raise ValueError(f"size: expected keys among {sorted(SIZE_KEYS)}, got {key!r}")
        if value is not None and bounds.setdefault(SIZE_KEYS[key], value) != value:
            raise ValueError(f"size: two spellings of one bound disagree: {dict(size or {})}")
    return bounds


def hf_part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The part called `name` of a nested `processor_config.json`; a flat config is returned as it is."""
    part = config.get(name, config) if isinstance(config, Mapping) else config
    if not isinstance(part, Mapping):
        raise TypeError(f"config: expected a mapping as read from {name}'s json, got {type(part).__name__}")
    return part


def read_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `PatchProcessor` that a Hugging Face preprocessor config states.

    Raises:
        ValueError: a setting that is fixed here (bicubic, 1/255, all steps on) and different there.
    """
    fixed = {"resample": 3, "rescale_factor": 1 / 255}
    fixed |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    fixed |= dict.fromkeys(("do_center_crop", "do_pad"), False)
    for key, expected in fixed.items():
        if hf.get(key) is not None and hf[key] != expected:
            raise ValueError(f"{key}: only {expected!r} is supported, got {hf[key]!r}")
    found: dict[str, Any] = size_bounds(hf.get("size"))
    found |= {field.name: hf[field.name] for field in fields(PatchProcessor) if hf.get(field.name) is not None}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def write_hf(processor: PatchProcessor) -> dict[str, Any]:
    """What `read_hf` reads, as transformers' processors take it."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "size": {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "patch_size": processor.patch_size,
        "temporal_patch_size": processor.temporal_patch_size,
        "merge_size": processor.merge_size,
    }
