"""The image processor: images to `pixel_values` and `image_grid_thw`, equal to transformers'."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor

from qwenvit.config.families import FAMILIES
from qwenvit.ops.checks import FLOATING, check
from qwenvit.preprocess.decode import Backend, Channels, ImageInput, each_image, open_image
from qwenvit.preprocess.hf_settings import config_section, read_hf_settings, write_hf_settings
from qwenvit.preprocess.jpeg import Decoder, check_decoder
from qwenvit.preprocess.options import ImageOptions, check_image_options
from qwenvit.preprocess.patch_processor import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PatchProcessor
from qwenvit.preprocess.prepared import Prepared, PreparedFrames, compute_on_host, pinned_copy
from qwenvit.preprocess.resize import bounds_from_size, smart_resize


@dataclass(frozen=True)
class ImageProcessor(PatchProcessor):
    """Resizes images and cuts them into normalised patches, `torch.equal` to transformers 5.23's on the CPU.

    `resize="torch"` equals `Qwen2VLImageProcessor`, which `AutoImageProcessor` builds where torchvision is installed;
    `resize="pillow"` equals `Qwen2VLImageProcessorPil`. `resize_frames` says how far the two differ. Pillow decodes
    files for both.

    Example:
        >>> pixel_values, grid = ImageProcessor.for_family("qwen3_vl")(["a.png", "b.jpg"], max_pixels=1_000_000)
    """

    resize: Backend = "torch"
    """Whose bicubic interpolation and rounding, `"torch"` or `"pillow"`."""

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
        `min_pixels` and `max_pixels` override `size`. `resize` is `"pillow"` where the type ends in `Pil`, else
        `"torch"`.

        Raises:
            TypeError: `config` is not a mapping.
            ValueError: a setting that this processor does not support, or an impossible value.
        """
        hf = config_section(config, "image_processor")
        hf_type = hf.get("image_processor_type")
        if hf_type is not None and not re.fullmatch(r"Qwen\w*VLImageProcessor\w*", str(hf_type)):
            raise ValueError(f"image_processor_type: expected Qwen…VLImageProcessor…, got {hf_type!r}")
        resize: Backend = "pillow" if str(hf_type).endswith("Pil") else "torch"
        return cls(**read_hf_settings(hf), resize=resize)

    def to_hf(self) -> dict[str, Any]:
        """Return the `preprocessor_config.json` from which transformers builds an equal processor.

        With `resize="pillow"` the type is `Qwen2VLImageProcessorPil`. That class reads it, and so does
        `AutoImageProcessor` with `backend="pil"`; otherwise transformers 5.23's `AutoImageProcessor` builds the
        torchvision processor from any type.
        """
        hf_type = "Qwen2VLImageProcessorPil" if self.resize == "pillow" else "Qwen2VLImageProcessor"
        return {"image_processor_type": hf_type} | write_hf_settings(self)

    def with_bounds(
        self,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        max_tokens: int | None = None,
    ) -> Self:
        """Return a copy of the processor with other bounds; see `PatchProcessor.with_bounds`.

        Args:
            min_pixels: lower bound of the area after resizing.
            max_pixels: upper bound of the area after resizing.
            size: both bounds as Hugging Face writes them.
            max_tokens: upper bound of an image's merged tokens, instead of `max_pixels`. Without a lower bound of the
                caller's, no image whose aspect ratio is at most `max_tokens` has more; a longer one may have more in
                its only row or column.

        Raises:
            ValueError: as in `PatchProcessor.with_bounds`; `max_tokens` beside another upper bound, or not a positive
                integer.
        """
        if max_tokens is None:
            return super().with_bounds(min_pixels, max_pixels, size)
        if not isinstance(max_tokens, int | np.integer) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise ValueError(f"max_tokens: expected a positive integer, got {max_tokens!r}")
        in_size = bounds_from_size(size)
        for other, value in (("max_pixels", max_pixels), ("size's longest_edge", in_size.get("max_pixels"))):
            if value is not None:
                raise ValueError(f"max_tokens: got {max_tokens} and {other} {value}; pass only one of them")
        max_pixels = int(max_tokens) * self.factor**2
        bounded = super().with_bounds(min_pixels, max_pixels, size)
        if min_pixels is None and "min_pixels" not in in_size:
            # Enlarging rounds both sides up to whole tokens, each to at most twice its length: up to 4 times the area.
            bounded = replace(bounded, min_pixels=max(1, min(bounded.min_pixels, max_pixels // 4)))
        return bounded

    def grid_for(
        self,
        height: int,
        width: int,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        max_tokens: int | None = None,
    ) -> tuple[int, int, int]:
        """Return the grid `(1, rows, columns)` of patches for an image of `height` × `width` pixels.

        Raises:
            ValueError: no pixels, an aspect ratio above 200, contradicting bounds.
        """
        bounded = self.with_bounds(min_pixels, max_pixels, size, max_tokens)
        height, width = smart_resize(height, width, self.factor, bounded.min_pixels, bounded.max_pixels)
        return 1, height // self.patch_size, width // self.patch_size

    def __call__(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        differentiable: bool = False,
        **options: Unpack[ImageOptions],
    ) -> tuple[Tensor, Tensor]:
        """Resize images and cut them into patches.

        Args:
            images: one image or several; `open_image` says what an image can be.
            device: where to resize and normalise 8-bit images, and where `pixel_values` are; the values are the same.
            dtype: float32, bfloat16 or float16; the values are those in float32, converted.
            differentiable: let gradients flow from `pixel_values` to the images that are tensors and require them. The
                images are float32 in [0, 1], with `do_rescale=False`; `resize` is `"torch"`. The values are the same.
                Otherwise, as in `Encoder.encode` and `features`, pixel values are detached from the images.
            options: min_pixels, max_pixels, max_tokens, size, resize, do_rescale, channels; see `ImageOptions`.

        Returns:
            `pixel_values` `[patches, C·T·P·P]`, in merge-block order, images one after another, and `image_grid_thw`
            `[images, 3]` int64 on the CPU.

        Raises:
            TypeError: an unknown option, or an image of a type or dtype that is not supported.
            ValueError: an impossible option, or an image that cannot be used; `differentiable` for images of 8 bits or
                for Pillow's resize, which rounds to 8 bits.
            OSError: a file that cannot be read.
        """
        device = torch.device(device)
        if differentiable:
            return self._differentiable(images, device, dtype, options)
        prepare = self.preparer(device, **options)
        prepared = [prepare(index, image) for index, image in enumerate(each_image(images))]
        grids = torch.tensor([one.grid for one in prepared], device="cpu")
        patches = grids.prod(1).tolist()
        pixel_values = self.new_pixel_values(sum(patches), device, dtype)
        for one, rows in zip(prepared, pixel_values.split(patches), strict=True):
            one.to(device).write(rows)
        return pixel_values, grids

    def _differentiable(
        self, images: ImageInput | Iterable[ImageInput], device: torch.device, dtype: torch.dtype, options: ImageOptions
    ) -> tuple[Tensor, Tensor]:
        prepare = self.preparer(device, **options)
        processor = prepare.processor
        check(not prepare.do_rescale, "differentiable", "float images and do_rescale=False", "do_rescale=True")
        check(processor.resize == "torch", "differentiable", "resize='torch'", f"resize={processor.resize!r}")
        check(dtype in FLOATING, "dtype", "float32, bfloat16 or float16", dtype)
        opened = [prepare.open(index, image, detach=False) for index, image in enumerate(each_image(images))]
        resized = (processor.resized_groups(one.data, one.grid, one.resize) for one in opened)
        rows = [processor.pixel_values(groups, "torch").to(device, dtype) for groups in resized]
        return torch.cat(rows), torch.tensor([one.grid for one in opened], device="cpu")

    def unpatchify(
        self, pixel_values: Tensor, grid_thw: Tensor | Sequence[Sequence[int]], *, denormalize: bool = True
    ) -> list[Tensor]:
        """Put patches together to the resized images that they were cut from. Gradients flow through it.

        Args:
            pixel_values: `[patches, C·T·P·P]` float32, bfloat16 or float16, in merge-block order, as the processor
                returns them, or other values of the same shape, such as their gradients.
            grid_thw: `[images, 3]` integers: 1, rows and columns of patches of each image.
            denormalize: multiply by `image_std` and add `image_mean`, so that normalised pixels are in [0, 1] again
                (bicubic interpolation of floats overshoots it at sharp edges). False for gradients.

        Returns:
            `[3, height, width]` float32 of each image, on the device of `pixel_values`: the mean of the
            `temporal_patch_size` copies of the image, which are equal unless you changed them.

        Raises:
            TypeError: `pixel_values` is not a floating tensor.
            ValueError: shapes that do not fit the processor or each other, or more groups of frames than an image has;
                the video processor's method takes those.
        """
        items = super().unpatchify(pixel_values, grid_thw, denormalize=denormalize)
        frames = max(map(len, items))
        check(frames == self.temporal_patch_size, "grid_thw", "one group of frames for each image", f"{frames} frames")
        return [item.mean(0) for item in items]

    def preparer(
        self, device: torch.device, decode: Decoder = "pillow", /, **options: Unpack[ImageOptions]
    ) -> "ImagePreparer":
        """Return what opens the images of a call, so that they can be written as rows of pixel values.

        Args:
            device: where pixel values will be. On the CPU everything is computed at once.
            decode: what decodes JPEG files; see `decode_jpeg`.
            options: see `ImageOptions`.

        Raises:
            TypeError: an unknown option.
            ValueError: an impossible option.
        """
        check_image_options(options)
        processor = self.with_bounds(
            options.get("min_pixels"), options.get("max_pixels"), options.get("size"), options.get("max_tokens")
        )
        if (resize := options.get("resize")) is not None:
            processor = replace(processor, resize=resize)
        check_decoder(decode, device)
        return ImagePreparer(processor, device, decode, options.get("channels"), options.get("do_rescale", True))


@dataclass(frozen=True)
class ImagePreparer:
    """Opens images one at a time, from any thread."""

    processor: ImageProcessor
    device: torch.device
    decode: Decoder
    channels: Channels
    do_rescale: bool

    def __call__(self, index: int | None, image: ImageInput) -> Prepared:
        """Open `images[index]`, or an image that has no number, and compute its pixel values if they are the host's.

        Raises:
            TypeError: an image of a type or dtype that is not supported.
            ValueError: an image that cannot be used.
            OSError: a file that cannot be read.
        """
        frames = self.open(index, image)
        on_gpu = self.device.type == "cuda"
        if frames.data.is_cuda:
            return frames
        if on_gpu and frames.data.dtype == torch.uint8:
            return replace(frames, data=pinned_copy(frames.data))
        # On the CPU, torch and Pillow resize in the thread that decoded. So are floats for a GPU: the kernels there
        # would round them differently.
        return compute_on_host(frames, pinned=on_gpu)

    def open(self, index: int | None, image: ImageInput, *, detach: bool = True) -> PreparedFrames:
        """Open `images[index]`, or an image that has no number; `detach=False` keeps the gradients of floats.

        Raises:
            TypeError: an image of a type or dtype that is not supported.
            ValueError: an image that cannot be used.
            OSError: a file that cannot be read.
        """
        processor, name = self.processor, "image" if index is None else f"images[{index}]"
        opened = open_image(
            image,
            channels=self.channels,
            do_rescale=self.do_rescale,
            backend=processor.resize,
            device=self.device,
            decode=self.decode,
            detach=detach,
            name=name,
        )
        try:
            grid = processor.grid_for(*opened.shape[1:])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return PreparedFrames(opened[None], grid, processor, processor.resize)
