"""The video processor: frames in, `pixel_values_videos` and `video_grid_thw` out, equal to transformers'."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwenvit.preprocess.decode import Channels, ImageInput, open_image
from qwenvit.preprocess.hf_settings import hf_part, read_hf, write_hf
from qwenvit.preprocess.patch_processor import HALF, PatchProcessor
from qwenvit.preprocess.resize import resize_frames, smart_resize
from qwenvit.preprocess.sampling import Rule, rule_of

RULES: dict[str, Rule] = {"Qwen2VLVideoProcessor": "qwen2_vl", "Qwen3VLVideoProcessor": "qwen3_vl"}
MAX_VIDEO_TOKENS: dict[Rule, int] = {"qwen2_vl": 128_000, "qwen3_vl": 768}


@dataclass(frozen=True)
class VideoProcessor(PatchProcessor):
    """Cuts the frames of a video into normalised patches, `torch.equal` to transformers 5.23's on the CPU.

    Frames are taken as given (choose them with `sample_frames`), resized by torch's bicubic interpolation as
    transformers does, and joined in groups of `temporal_patch_size`; the last frame is repeated to fill its group.

    `cap_pixels_per_frame` is the argument of that name in transformers, where unset means False and the announced
    default of 5.22 and later is True; its versions without the argument (4.57, 5.17) do what False does.
    """

    rule: Rule = "qwen2_vl"
    """What the pixel bounds are for: each frame (`"qwen2_vl"`) or all frames together (`"qwen3_vl"`)."""
    cap_pixels_per_frame: bool = False
    """Bound also the other: all frames together (`"qwen2_vl"`) or each frame (`"qwen3_vl"`)."""
    max_video_tokens: int = 128_000
    """The bound of that cap in merged tokens: nine tenths of it a video (Qwen2), or a frame (Qwen3)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in MAX_VIDEO_TOKENS:
            raise ValueError(f"rule: expected one of {sorted(MAX_VIDEO_TOKENS)}, got {self.rule!r}")
        tokens = self.max_video_tokens
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ValueError(f"max_video_tokens: expected a positive integer, got {tokens!r}")

    @classmethod
    def for_family(cls, family: str) -> "VideoProcessor":
        """The processor transformers builds for a family's published models.

        Qwen2, Qwen2.5 and Qwen3-Omni models publish no config for videos: theirs of images (3136 to 12845056 pixels)
        bounds each frame. Qwen3 and 3.5: 4096 to 25165824 pixels over all frames.

        Raises:
            ValueError: unknown family.
        """
        if rule_of(family) == "qwen3_vl":
            return cls(
                patch_size=16,
                min_pixels=4096,
                max_pixels=25_165_824,
                image_mean=HALF,
                image_std=HALF,
                rule="qwen3_vl",
                max_video_tokens=MAX_VIDEO_TOKENS["qwen3_vl"],
            )
        if family == "qwen3_omni":
            return cls(patch_size=16, max_pixels=12_845_056, image_mean=HALF, image_std=HALF)
        return cls(max_pixels=12_845_056)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], family: str | None = None) -> "VideoProcessor":
        """Read a `video_preprocessor_config.json`, or the `video_processor` in a `processor_config.json`.

        A `preprocessor_config.json` for images is read as transformers does where a model has no other. What is not
        stated is as in transformers' processor of the type stated, or else of the family. As there, that of Qwen3
        reads its bounds from `size` alone.

        Raises:
            TypeError: `config` is not a mapping.
            ValueError: a setting this processor does not have, impossible values, or no type and no family.
        """
        config = hf_part(config, "video_processor")
        rule = _rule_in(config, family)
        found: dict[str, Any] = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}
        if rule == "qwen3_vl":
            config = {key: value for key, value in config.items() if key not in ("min_pixels", "max_pixels")}
            found = {"patch_size": 16, "min_pixels": 128 * 32 * 32, "max_pixels": 768 * 32 * 32}
            found |= {"image_mean": HALF, "image_std": HALF}
        found |= {"rule": rule, "max_video_tokens": config.get("max_video_tokens") or MAX_VIDEO_TOKENS[rule]}
        found |= {"cap_pixels_per_frame": bool(config.get("cap_pixels_per_frame"))}
        return cls(**found | read_hf(config))

    def to_hf(self) -> dict[str, Any]:
        """The `video_preprocessor_config.json` from which transformers builds an equal processor."""
        name = next(name for name, rule in RULES.items() if rule == self.rule)
        caps = {"cap_pixels_per_frame": self.cap_pixels_per_frame, "max_video_tokens": self.max_video_tokens}
        return {"video_processor_type": name} | write_hf(self) | caps

    def grid_for(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The grid `(groups of frames, rows, columns)` of patches that such a video gets.

        Raises:
            ValueError: no pixels, an aspect ratio above 200, or fewer frames than Qwen3's rule wants.
        """
        height, width, max_pixels, frames = self._budget(num_frames, height, width)
        rows, columns = smart_resize(height, width, self.factor, self.min_pixels, max_pixels, **frames)
        return math.ceil(num_frames / self.temporal_patch_size), rows // self.patch_size, columns // self.patch_size

    def _budget(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, dict[str, int]]:
        """What the size rule is asked: sides, upper bound, and the frames that share it."""
        token, floor = self.factor**2, int(self.min_pixels * 1.05)
        max_pixels = self.max_pixels
        if self.rule == "qwen2_vl":
            if num_frames < 1:
                raise ValueError("expected at least one frame, got none")
            if self.cap_pixels_per_frame:
                share = int(self.max_video_tokens * token * 0.9) * self.temporal_patch_size // num_frames
                max_pixels = max(min(max_pixels, share), floor)
            return height, width, max_pixels, {}
        if num_frames < self.temporal_patch_size:
            raise ValueError(f"expected at least {self.temporal_patch_size}, got {num_frames}; encode it as an image")
        if self.cap_pixels_per_frame:
            share = min(self.max_video_tokens * token, max_pixels // num_frames)
            max_pixels = max(share, floor) * num_frames
        if 0 < min(height, width) < self.factor:
            scale = max(self.factor / height, self.factor / width)
            height, width = int(height * scale), int(width * scale)
        return height, width, max_pixels, {"num_frames": num_frames, "temporal_factor": self.temporal_patch_size}

    def __call__(
        self,
        frames: Iterable[ImageInput],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        channels: Channels = None,
        cap_pixels_per_frame: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cut one video into patches.

        Args:
            frames: images of one size (see `open_image`), or one uint8 array or tensor `[frames, H, W, C]` or
                `[frames, C, H, W]`. Transparent frames are laid over white as PIL images or arrays are, in 8 bits
                (transformers keeps the fractions in videos; opaque ones are equal).
            min_pixels: least area, of a frame or of all (see `rule`); alone it leaves `max_pixels` as it is.
            max_pixels: largest area; alone it leaves `min_pixels` as it is.
            size: the same two as Hugging Face writes them, `{"shortest_edge": area, "longest_edge": area}`.
            channels: where arrays have their channels; None finds out, and refuses shapes that could be either.
            cap_pixels_per_frame: None for the processor's own.

        Returns:
            `pixel_values_videos` `[patches, C·T·P·P]` float32 in merge-block order, and `video_grid_thw` `[1, 3]`
            int64.

        Raises:
            TypeError, ValueError: frames or options that cannot be used, named with what was expected.
            OSError: a file that cannot be read.
        """
        own = self.with_bounds(min_pixels, max_pixels, size)
        if cap_pixels_per_frame is not None:
            own = replace(own, cap_pixels_per_frame=cap_pixels_per_frame)
        video = _open_frames(frames, channels)
        try:
            grid = own.grid_for(len(video), *video.shape[2:])
        except ValueError as error:
            raise ValueError(f"frames: {error}") from error
        video = resize_frames(video, grid[1] * self.patch_size, grid[2] * self.patch_size, "torch")
        if missing := -len(video) % self.temporal_patch_size:
            video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
        return own.pixel_values(video, "torch"), torch.tensor([grid], device="cpu")


def _rule_in(config: Mapping[str, Any], family: str | None) -> Rule:
    """The rule a config states: by its own type, else that of its image processor, else by the family."""
    if (stated := config.get("video_processor_type")) is not None:
        if stated not in RULES:
            raise ValueError(f"video_processor_type: expected one of {sorted(RULES)}, got {stated!r}")
        return RULES[stated]
    inferred = str(config.get("image_processor_type")).replace("ImageProcessor", "VideoProcessor")
    if inferred in RULES:
        return RULES[inferred]
    if family is None:
        raise ValueError(f"family: needed for a config without a video_processor_type ({sorted(RULES)})")
    return rule_of(family)


def _open_frames(frames: Iterable[ImageInput] | NDArray[Any] | Tensor, channels: Channels) -> Tensor:
    """`[frames, 3, H, W]` uint8."""
    if isinstance(frames, np.ndarray | Tensor) and frames.ndim != 4:
        raise ValueError(f"frames: expected [frames, H, W, C] or [frames, C, H, W], got {list(frames.shape)}")
    if isinstance(frames, Image.Image | str | bytes) or not isinstance(frames, Iterable):
        raise TypeError(f"frames: expected a list of images or one array of them, got {type(frames).__name__}")
    opened = [
        open_image(frame, channels=channels, backend="torch", name=f"frames[{index}]")
        for index, frame in enumerate(frames)
    ]
    if not opened:
        raise ValueError("frames: expected at least one frame, got none")
    for index, frame in enumerate(opened):
        if frame.shape != opened[0].shape:
            sizes = [f"{height} x {width}" for _, height, width in (opened[0].shape, frame.shape)]
            raise ValueError(f"frames[{index}]: expected the first frame's size, {sizes[0]}, got {sizes[1]}")
    return torch.stack(opened)
