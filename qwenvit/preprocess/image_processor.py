"""The image processor: images to `pixel_values` and `image_grid_thw`, equal to transformers'."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from qwenvit.config.families import FAMILIES
from qwenvit.preprocess.decode import Backend, Channels, ImageInput, each_image, open_image
from qwenvit.preprocess.hf_settings import config_section, read_hf_settings, write_hf_settings
from qwenvit.preprocess.options import ImageOptions, check_image_options
from qwenvit.preprocess.patch_processor import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PatchProcessor
from qwenvit.preprocess.resize import resize_frames, smart_resize


@dataclass(frozen=True)
class ImageProcessor(PatchProcessor):
    """Resizes images and cuts them into normalised patches, `torch.equal` to transformers 5.23's on the CPU.

    `resize="pillow"` equals `Qwen2VLImageProcessorPil`; `resize="torch"` equals `Qwen2VLImageProcessor`, transformers'
    default where torchvision is installed. `resize_frames` says how far the two differ. Pillow decodes files for both.

    Example:
        >>> pixel_values, grid = ImageProcessor.for_family("qwen3_vl")(["a.png", "b.jpg"], max_pixels=1_000_000)
    """

    resize: Backend = "pillow"
    """Whose bicubic interpolation and rounding, `"pillow"` or `"torch"`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize not in ("pillow", "torch"):
            raise ValueError(f"resize: expected 'pillow' or 'torch', got {self.resize!r}")

    @classmethod
    def for_family(cls, family: str) -> "ImageProcessor":
        """Return the processor of a family's published models; Qwen3-Omni has Qwen2's pixel bounds.

        Raises:
            ValueError: unknown family.
        """
        if family not in FAMILIES:
            raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {family!r}")
        if not FAMILIES[family].learned_positions:
            return cls(max_pixels=12_845_056)
        if family == "qwen3_omni":
            min_pixels, max_pixels = cls.min_pixels, 12_845_056
        else:
            min_pixels, max_pixels = 65_536, 16_777_216
        return cls(
            patch_size=16,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            image_mean=IMAGENET_STANDARD_MEAN,
            image_std=IMAGENET_STANDARD_STD,
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ImageProcessor":
        """Read a `preprocessor_config.json`, or the `image_processor` in a `processor_config.json`.

        A setting that is not stated has the default of transformers' `Qwen2VLImageProcessor`. As in transformers,
        `min_pixels` and `max_pixels` override `size`.

        Raises:
            TypeError: `config` is not a mapping.
            ValueError: a setting that this processor does not support, or an impossible value.
        """
        hf = config_section(config, "image_processor")
        hf_type = hf.get("image_processor_type")
        if hf_type is not None and not re.fullmatch(r"Qwen\w*VLImageProcessor\w*", str(hf_type)):
            raise ValueError(f"image_processor_type: expected Qwen…VLImageProcessor…, got {hf_type!r}")
        return cls(**read_hf_settings(hf))

    def to_hf(self) -> dict[str, Any]:
        """Return the `preprocessor_config.json` from which transformers builds an equal processor."""
        return {"image_processor_type": "Qwen2VLImageProcessor"} | write_hf_settings(self)

    def grid_for(
        self,
        height: int,
        width: int,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
    ) -> tuple[int, int, int]:
        """Return the grid `(1, rows, columns)` of patches for an image of `height` × `width` pixels.

        Raises:
            ValueError: no pixels, an aspect ratio above 200, contradicting bounds.
        """
        bounded = self.with_bounds(min_pixels, max_pixels, size)
        height, width = smart_resize(height, width, self.factor, bounded.min_pixels, bounded.max_pixels)
        return 1, height // self.patch_size, width // self.patch_size

    def __call__(
        self, images: ImageInput | Iterable[ImageInput], **options: Unpack[ImageOptions]
    ) -> tuple[Tensor, Tensor]:
        """Resize images and cut them into patches.

        Args:
            images: one image or several; `open_image` says what an image can be.
            options: min_pixels, max_pixels, size, resize, do_rescale, channels; see `ImageOptions`.

        Returns:
            `pixel_values` `[patches, C·T·P·P]` float32, in merge-block order, images one after another, and
            `image_grid_thw` `[images, 3]` int64.

        Raises:
            TypeError: an unknown option, or an image of a type or dtype that is not supported.
            ValueError: an impossible option, or an image that cannot be used.
            OSError: a file that cannot be read.
        """
        check_image_options(options)  # here too: `each` also takes single_frame
        patches, grids = zip(*self.each(images, **options), strict=True)
        return (patches[0] if len(patches) == 1 else torch.cat(patches)), torch.cat(grids)

    def each(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        single_frame: bool = False,
        **options: Unpack[ImageOptions],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut images into patches one at a time; an image is opened only when the iterator reaches it.

        Args:
            images: one image or several; `open_image` says what an image can be.
            single_frame: do not repeat an image to fill `temporal_patch_size`.
            options: min_pixels, max_pixels, size, resize, do_rescale, channels; see `ImageOptions`.

        Returns:
            An iterator of `pixel_values` `[patches, C·T·P·P]` float32 (`[patches, C·P·P]` with `single_frame`) and
            `image_grid_thw` `[1, 3]` int64.

        Raises:
            TypeError: an unknown option; while iterating, an image of a type or dtype that is not supported.
            ValueError: an impossible option; while iterating, an image that cannot be used.
            OSError: while iterating, a file that cannot be read.
        """
        check_image_options(options)
        processor = self.with_bounds(options.get("min_pixels"), options.get("max_pixels"), options.get("size"))
        if (resize := options.get("resize")) is not None:
            processor = replace(processor, resize=resize)
        if single_frame:
            processor = replace(processor, temporal_patch_size=1)
        channels, do_rescale = options.get("channels"), options.get("do_rescale", True)
        return (
            processor._process(image, channels, do_rescale, f"images[{index}]")
            for index, image in enumerate(each_image(images))
        )

    def _process(self, image: ImageInput, channels: Channels, do_rescale: bool, name: str) -> tuple[Tensor, Tensor]:
        opened = open_image(image, channels=channels, do_rescale=do_rescale, backend=self.resize, name=name)
        try:
            grid = self.grid_for(*opened.shape[1:])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        _, rows, columns = grid
        frame = resize_frames(opened[None], rows * self.patch_size, columns * self.patch_size, self.resize)
        frames = frame.expand(self.temporal_patch_size, -1, -1, -1)
        return self.pixel_values(frames, self.resize), torch.tensor([grid], device="cpu")
