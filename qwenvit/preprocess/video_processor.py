"""The video processor: frames to `pixel_values_videos` and `video_grid_thw`, equal to transformers'."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwenvit.preprocess.decode import Channels, ImageInput
from qwenvit.preprocess.hf_settings import config_section, read_hf_settings, write_hf_settings
from qwenvit.preprocess.patch_processor import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PatchProcessor
from qwenvit.preprocess.resize import smart_resize
from qwenvit.preprocess.sampling import DEFAULT_TARGET_FPS, VideoRule, sample_frames, video_rule
from qwenvit.preprocess.video_frames import VideoPreparer, first_of, open_frame, sized_frames

RULE_OF_HF_TYPE: dict[str, VideoRule] = {"Qwen2VLVideoProcessor": "qwen2_vl", "Qwen3VLVideoProcessor": "qwen3_vl"}
DEFAULT_MAX_VIDEO_TOKENS: dict[VideoRule, int] = {"qwen2_vl": 128_000, "qwen3_vl": 768}


@dataclass(frozen=True)
class VideoProcessor(PatchProcessor):
    """Resizes frames and cuts them into normalised patches, `torch.equal` to transformers 5.23's on the CPU.

    The caller chooses the frames (`sample`). They are resized by torch's bicubic interpolation, as in
    transformers, and joined in groups of `temporal_patch_size`; the last frame is repeated to fill its group.
    """

    rule: VideoRule = "qwen2_vl"
    """What the pixel bounds limit: each frame (`"qwen2_vl"`) or all frames together (`"qwen3_vl"`)."""
    cap_pixels_per_frame: bool = False
    """Also limit the pixels of all frames together (`"qwen2_vl"`) or of each frame (`"qwen3_vl"`), by
    `max_video_tokens`. transformers 5.23 has the same argument: unset means False, and a warning announces that True
    will be the default. Versions without it (4.57, 5.17) do what False does."""
    max_video_tokens: int = 128_000
    """The limit of `cap_pixels_per_frame` in merged tokens: 90 % of it for a video (`"qwen2_vl"`), all of it for a
    frame (`"qwen3_vl"`)."""
    fps: float | None = None
    """Frames per second that `sample` takes. None: `num_frames` in all, or 2 a second if that is None too."""
    num_frames: int | None = None
    """Frames that `sample` takes in all. None: `fps` a second."""
    min_frames: int = 4
    """With `fps`, take at least this many frames, if the clip has them."""
    max_frames: int = 768
    """With `fps`, take at most this many frames."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in DEFAULT_MAX_VIDEO_TOKENS:
            raise ValueError(f"rule: expected one of {sorted(DEFAULT_MAX_VIDEO_TOKENS)}, got {self.rule!r}")
        counts = {name: getattr(self, name) for name in ("max_video_tokens", "min_frames", "max_frames")}
        if self.num_frames is not None:
            counts["num_frames"] = self.num_frames
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name}: expected a positive integer, got {count!r}")
        fps = self.fps
        if fps is not None and (not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < math.inf):
            raise ValueError(f"fps: expected a positive number, got {fps!r}")

    @classmethod
    def for_family(cls, family: str) -> "VideoProcessor":
        """Return the processor that transformers builds for a family's published models.

        Qwen2, Qwen2.5 and Qwen3-Omni publish no config for videos, so the bounds of images, 3136 to 12845056 pixels,
        limit each frame. In Qwen3 and 3.5 all frames together have 4096 to 25165824 pixels, and 2 frames a second are
        sampled.

        Raises:
            ValueError: unknown family.
        """
        if video_rule(family) == "qwen3_vl":
            return cls(
                patch_size=16,
                min_pixels=4096,
                max_pixels=25_165_824,
                image_mean=IMAGENET_STANDARD_MEAN,
                image_std=IMAGENET_STANDARD_STD,
                rule="qwen3_vl",
                max_video_tokens=DEFAULT_MAX_VIDEO_TOKENS["qwen3_vl"],
                fps=DEFAULT_TARGET_FPS,
            )
        if family == "qwen3_omni":
            return cls(
                patch_size=16,
                max_pixels=12_845_056,
                image_mean=IMAGENET_STANDARD_MEAN,
                image_std=IMAGENET_STANDARD_STD,
            )
        return cls(max_pixels=12_845_056)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], family: str | None = None) -> "VideoProcessor":
        """Read a `video_preprocessor_config.json`, or the `video_processor` in a `processor_config.json`.

        A model without them has its `preprocessor_config.json` for images read instead, as in transformers. A setting
        that is not stated has the default of transformers' processor: of the stated type, or else of the family. As in
        transformers, Qwen3's processor reads its bounds from `size` alone. Its 2 frames a second are the default where
        neither `fps` nor `num_frames` is stated; transformers refuses to sample where only `num_frames` is.

        Raises:
            TypeError: `config` is not a mapping.
            ValueError: a setting that this processor does not support, an impossible value, or neither a type nor a
                family.
        """
        config = config_section(config, "video_processor")
        rule = _rule_from_config(config, family)
        settings: dict[str, Any] = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}
        if rule == "qwen3_vl":
            config = {key: value for key, value in config.items() if key not in ("min_pixels", "max_pixels")}
            settings = {"patch_size": 16, "min_pixels": 128 * 32 * 32, "max_pixels": 768 * 32 * 32}
            settings |= {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
        settings |= {"rule": rule, "max_video_tokens": config.get("max_video_tokens") or DEFAULT_MAX_VIDEO_TOKENS[rule]}
        settings |= {"cap_pixels_per_frame": bool(config.get("cap_pixels_per_frame"))}
        sampling = ("fps", "num_frames", "min_frames", "max_frames")
        settings |= {name: config[name] for name in sampling if config.get(name) is not None}
        if rule == "qwen3_vl" and "num_frames" not in settings:
            settings.setdefault("fps", DEFAULT_TARGET_FPS)
        return cls(**settings | read_hf_settings(config))

    def to_hf(self) -> dict[str, Any]:
        """Return the `video_preprocessor_config.json` from which transformers builds an equal processor."""
        hf_type = next(name for name, rule in RULE_OF_HF_TYPE.items() if rule == self.rule)
        caps = {"cap_pixels_per_frame": self.cap_pixels_per_frame, "max_video_tokens": self.max_video_tokens}
        fps = DEFAULT_TARGET_FPS if self.rule == "qwen3_vl" and self.fps is self.num_frames is None else self.fps
        sampling = {"fps": fps, "num_frames": self.num_frames}
        sampling |= {"min_frames": self.min_frames, "max_frames": self.max_frames}
        return {"video_processor_type": hf_type} | write_hf_settings(self) | caps | sampling

    def sample(
        self, total_frames: int, video_fps: float | None, *, fps: float | None = None, num_frames: int | None = None
    ) -> list[int]:
        """Return which frames of a clip to encode, as transformers' processor with these settings samples them.

        Args:
            total_frames: frames of the clip.
            video_fps: frames per second of the clip. None where it is not known: Qwen3's rule then assumes 24, Qwen2's
                requires a number of frames.
            fps: frames per second to take, between `min_frames` and `max_frames` in all.
            num_frames: frames to take in all. Where neither `fps` nor `num_frames` is passed, both are the processor's
                own; if those are None too, 2 frames a second are taken, as in Qwen's `qwen_vl_utils`.

        Returns:
            Indices from 0, ascending.

        Raises:
            ValueError: a number that is not positive, both `fps` and `num_frames`, more frames than the clip has, or
                too few for one group.
        """
        if fps is None and num_frames is None:
            fps, num_frames = self.fps, self.num_frames
        if fps is not None and num_frames is not None:
            raise ValueError(f"num_frames: expected only one of num_frames={num_frames} and fps={fps}")
        return sample_frames(
            total_frames,
            video_fps,
            family=self.rule,
            target_fps=fps,
            num_frames=num_frames,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
        )

    def grid_for(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the grid `(groups of frames, rows, columns)` of patches for frames of `height` × `width` pixels.

        Raises:
            ValueError: no pixels, an aspect ratio above 200, or fewer frames than the rule requires.
        """
        resize = self._resized_qwen2 if self.rule == "qwen2_vl" else self._resized_qwen3
        height, width = resize(num_frames, height, width)
        return math.ceil(num_frames / self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def _resized_qwen2(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the size of each frame after resizing; the pixel bounds limit one frame."""
        if num_frames < 1:
            raise ValueError("expected at least one frame, got none")
        max_pixels = self.max_pixels
        if self.cap_pixels_per_frame:
            video_pixels = int(self.max_video_tokens * self.factor**2 * 0.9) * self.temporal_patch_size
            max_pixels = max(min(max_pixels, video_pixels // num_frames), self._least_cap)
        return smart_resize(height, width, self.factor, self.min_pixels, max_pixels)

    def _resized_qwen3(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Return the size of each frame after resizing; the pixel bounds limit all frames together."""
        if num_frames < self.temporal_patch_size:
            raise ValueError(f"expected at least {self.temporal_patch_size}, got {num_frames}; encode it as an image")
        max_pixels = self.max_pixels
        if self.cap_pixels_per_frame:
            frame_pixels = min(self.max_video_tokens * self.factor**2, max_pixels // num_frames)
            max_pixels = max(frame_pixels, self._least_cap) * num_frames
        if 0 < min(height, width) < self.factor:
            scale = max(self.factor / height, self.factor / width)
            height, width = int(height * scale), int(width * scale)
        return smart_resize(
            height,
            width,
            self.factor,
            self.min_pixels,
            max_pixels,
            num_frames=num_frames,
            temporal_factor=self.temporal_patch_size,
        )

    @property
    def _least_cap(self) -> int:
        """The lowest upper bound that `cap_pixels_per_frame` may set, in pixels of a frame."""
        return int(self.min_pixels * 1.05)

    def __call__(
        self,
        frames: Iterable[ImageInput],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        channels: Channels = None,
        cap_pixels_per_frame: bool | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Resize the frames of one video and cut them into patches.

        Args:
            frames: images of one size (`open_image` says what an image can be), or one uint8 array or tensor
                `[frames, H, W, C]` or `[frames, C, H, W]`. Transparent frames are composited over white in 8 bits;
                transformers keeps the fractions in videos. Opaque frames are equal.
            min_pixels: lower bound of the area of each frame (Qwen2) or of all frames together (Qwen3). None: the
                processor's own.
            max_pixels: upper bound of that area. None: the processor's own.
            size: both bounds as Hugging Face writes them, `{"shortest_edge": min_pixels, "longest_edge": max_pixels}`.
            channels: the axis of an array's channels, `"first"` or `"last"`. None: inferred from its shape; a shape
                that could be either is refused.
            cap_pixels_per_frame: as the field of this name. None: the processor's own.
            device: where to resize and normalise, and where `pixel_values_videos` are; the values are the same.
            dtype: float32, bfloat16 or float16; the values are those in float32, converted.

        Returns:
            `pixel_values_videos` `[patches, C·T·P·P]`, in merge-block order, and `video_grid_thw` `[1, 3]` int64 on the
            CPU.

        Raises:
            TypeError: frames of a type or dtype that is not supported.
            ValueError: frames that cannot be used, or impossible options.
            OSError: a file that cannot be read.
        """
        processor = self.with_bounds(min_pixels, max_pixels, size)
        device = torch.device(device)
        prepare = processor.preparer(frames, device, channels=channels, cap_pixels_per_frame=cap_pixels_per_frame)
        pixel_values = self.new_pixel_values(math.prod(prepare.grid), device, dtype)
        start = 0
        for index, piece in enumerate(prepare.pieces()):
            prepared = prepare(index, piece)
            patches = math.prod(prepared.grid)
            prepared.to(device).write(pixel_values[start : start + patches])
            start += patches
        return pixel_values, torch.tensor([prepare.grid], device="cpu")

    def preparer(
        self,
        frames: Iterable[ImageInput],
        device: torch.device,
        *,
        channels: Channels = None,
        cap_pixels_per_frame: bool | None = None,
    ) -> VideoPreparer:
        """Return what opens the frames of a video piece by piece, so that they can be written as pixel values.

        Args:
            frames: as `__call__` takes them.
            device: where pixel values will be. On the CPU everything is computed at once.
            channels: as `__call__` takes it.
            cap_pixels_per_frame: as `__call__` takes it.

        Raises:
            TypeError: frames of a type that is not supported.
            ValueError: no frames, too few or of an impossible size.
            OSError: the first frame cannot be read.
        """
        processor = self
        if cap_pixels_per_frame is not None:
            processor = replace(self, cap_pixels_per_frame=cap_pixels_per_frame)
        sized = sized_frames(frames)
        first, every = first_of(sized)
        height, width = open_frame(first, 0, channels, device).shape[1:]
        try:
            grid = processor.grid_for(len(sized), height, width)
        except ValueError as error:
            raise ValueError(f"frames: {error}") from error
        return VideoPreparer(processor, every, (height, width), grid, channels, device)


def _rule_from_config(config: Mapping[str, Any], family: str | None) -> VideoRule:
    """Return the rule of a config's `video_processor_type`, else of its `image_processor_type`, else of the family."""
    if (hf_type := config.get("video_processor_type")) is not None:
        if hf_type not in RULE_OF_HF_TYPE:
            raise ValueError(f"video_processor_type: expected one of {sorted(RULE_OF_HF_TYPE)}, got {hf_type!r}")
        return RULE_OF_HF_TYPE[hf_type]
    inferred = str(config.get("image_processor_type")).replace("ImageProcessor", "VideoProcessor")
    if inferred in RULE_OF_HF_TYPE:
        return RULE_OF_HF_TYPE[inferred]
    if family is None:
        raise ValueError(f"family: needed for a config without a video_processor_type ({sorted(RULE_OF_HF_TYPE)})")
    return video_rule(family)
