"""The image processor: images in, `pixel_values` and `image_grid_thw` out, equal to transformers'."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwenvit.config.families import FAMILIES
from qwenvit.preprocess.decode import Backend, Channels, ImageInput, each_image, open_image
from qwenvit.preprocess.hf_settings import hf_part, read_hf, write_hf
from qwenvit.preprocess.patch_processor import HALF, PatchProcessor
from qwenvit.preprocess.resize import resize_frames, smart_resize


@dataclass(frozen=True)
class ImageProcessor(PatchProcessor):
    """Cuts images into normalised patches, `torch.equal` to transformers 5.23's processors on the CPU.

    `resize="pillow"` equals `Qwen2VLImageProcessorPil`, `resize="torch"` equals `Qwen2VLImageProcessor` (its default,
    for which it needs torchvision; files are decoded by Pillow in both). Resized bytes of the two differ by up to 2
    levels.

    Example:
        >>> pixel_values, grid = ImageProcessor.for_family("qwen3_vl")(["a.png", "b.jpg"], max_pixels=1_000_000)
    """

    resize: Backend = "pillow"
    """Whose bicubic interpolation and rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_backend(self.resize)

    @classmethod
    def for_family(cls, family: str) -> "ImageProcessor":
        """The processor of a family's published models (Qwen3-Omni has Qwen2's pixel bounds).

        Raises:
            ValueError: unknown family.
        """
        if family not in FAMILIES:
            raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {family!r}")
        if not FAMILIES[family].learned_positions:
            return cls(max_pixels=12_845_056)
        if family == "qwen3_omni":
            return cls(patch_size=16, max_pixels=12_845_056, image_mean=HALF, image_std=HALF)
        return cls(patch_size=16, min_pixels=65_536, max_pixels=16_777_216, image_mean=HALF, image_std=HALF)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ImageProcessor":
        """Read a `preprocessor_config.json`, or the `image_processor` in a `processor_config.json`.

        What is not stated is as in transformers' `Qwen2VLImageProcessor`. `min_pixels` and `max_pixels` at the top
        win over `size`, as there.

        Raises:
            TypeError: `config` is not a mapping.
            ValueError: a setting this processor does not have, or impossible values.
        """
        hf = hf_part(config, "image_processor")
        kind = hf.get("image_processor_type")
        if kind is not None and not re.fullmatch(r"Qwen\w*VLImageProcessor\w*", str(kind)):
            raise ValueError(f"image_processor_type: expected Qwen2VLImageProcessor or a kin of it, got {kind!r}")
        return cls(**read_hf(hf))

    def to_hf(self) -> dict[str, Any]:
        """The `preprocessor_config.json` from which transformers builds an equal processor."""
        return {"image_processor_type": "Qwen2VLImageProcessor"} | write_hf(self)

    def grid_for(
        self,
        height: int,
        width: int,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
    ) -> tuple[int, int, int]:
        """The grid `(1, rows, columns)` of patches that an image of this size gets, without an image.

        Raises:
            ValueError: no pixels, an aspect ratio above 200, contradicting bounds.
        """
        own = self.with_bounds(min_pixels, max_pixels, size)
        rows, columns = smart_resize(height, width, own.factor, own.min_pixels, own.max_pixels)
        return 1, rows // self.patch_size, columns // self.patch_size

    def __call__(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        resize: Backend | None = None,
        do_rescale: bool = True,
        channels: Channels = None,
    ) -> tuple[Tensor, Tensor]:
        """Cut images into patches.

        Args:
            images: one image or several; see `open_image` for what they can be.
            min_pixels: least area after resizing; alone it leaves `max_pixels` as it is.
            max_pixels: largest area after resizing; alone it leaves `min_pixels` as it is.
            size: the same two as Hugging Face writes them, `{"shortest_edge": area, "longest_edge": area}`.
            resize: `"pillow"` or `"torch"`; None for the processor's own.
            do_rescale: False says that the images are float32 arrays already scaled to [0, 1]. `"pillow"` takes
                those down to 8 bits, `"torch"` keeps them.
            channels: where arrays have their channels; None finds out, and refuses shapes that could be either.

        Returns:
            `pixel_values` `[patches, C·T·P·P]` float32, patches in merge-block order, images one after another, and
            `image_grid_thw` `[images, 3]` int64.

        Raises:
            TypeError, ValueError: an image or option that cannot be used, named with what was expected.
            OSError: a file that cannot be read.
        """
        items = self.each(
            images,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            size=size,
            resize=resize,
            do_rescale=do_rescale,
            channels=channels,
        )
        patches, grids = zip(*items, strict=True)
        return (patches[0] if len(patches) == 1 else torch.cat(patches)), torch.cat(grids)

    def each(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        size: Mapping[str, int] | None = None,
        resize: Backend | None = None,
        do_rescale: bool = True,
        channels: Channels = None,
        once: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The images one at a time, each opened only when it is asked for: `(pixel_values, image_grid_thw [1, 3])`.

        Arguments and errors are those of calling the processor; errors come while iterating. `once=True` gives the
        image's one frame without its repetitions, `[patches, C·P·P]`.
        """
        backend = self.resize if resize is None else resize
        _check_backend(backend)
        own = self.with_bounds(min_pixels, max_pixels, size)
        if once:
            own = replace(own, temporal_patch_size=1)
        for index, image in enumerate(each_image(images)):
            name = f"images[{index}]"
            opened = open_image(image, channels=channels, do_rescale=do_rescale, backend=backend, name=name)
            try:
                grid = own.grid_for(*opened.shape[1:])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            _, rows, columns = grid
            frame = resize_frames(opened[None], rows * self.patch_size, columns * self.patch_size, backend)
            still = frame.expand(own.temporal_patch_size, -1, -1, -1)
            yield own.pixel_values(still, backend), torch.tensor([grid], device="cpu")


def _check_backend(backend: str) -> None:
    if backend not in ("pillow", "torch"):
        raise ValueError(f"resize: expected 'pillow' or 'torch', got {backend!r}")
