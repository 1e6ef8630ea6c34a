"""Opening images: files, bytes, PIL images, arrays and tensors to RGB tensors."""

import io
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwenvit.ops.resampling import ResizeRule
from qwenvit.preprocess.image_file import (
    EIGHT_BIT_MODES,
    check_undecoded,
    decode_file,
    naming_broken_files,
    open_source,
    read_header,
)
from qwenvit.preprocess.jpeg import Decoder, decode_jpeg

EncodedImage = bytes | bytearray | memoryview | io.BytesIO
ImageInput = Image.Image | NDArray[Any] | Tensor | str | os.PathLike[str] | EncodedImage
IMAGE_TYPES = (Image.Image, np.ndarray, Tensor, str, os.PathLike, bytes, bytearray, memoryview, io.BytesIO)
Channels = Literal["first", "last"] | None
Backend = ResizeRule
"""Whose arithmetic resizes and normalises."""

CHANNEL_COUNTS = (1, 3, 4)

_LOADING = tuple(threading.RLock() for _ in range(61))
"""Pillow reads an image's file at first use, and not from two threads at once: a lock by the address of the image."""


def each_image(images: ImageInput | Iterable[ImageInput]) -> Iterator[ImageInput]:
    """Yield one image or several one at a time, without drawing ahead from a generator.

    Raises:
        ValueError: no image, or several images in one array (pass a list of them).
        TypeError: neither an image nor an iterable of images.
    """
    if isinstance(images, np.ndarray | Tensor) and images.ndim > 3:
        check_array(images, "images")
        raise ValueError(f"images: expected a list, got one array {list(images.shape)}; pass list(images)")
    if isinstance(images, IMAGE_TYPES):
        yield images
        return
    if not isinstance(images, Iterable) or isinstance(images, Mapping | io.IOBase):
        hint = "pass a file's path or its bytes"
        raise TypeError(f"images: expected an image or several, got {type(images).__name__}; {hint}")
    empty = True
    for image in images:
        empty = False
        yield image
    if empty:
        raise ValueError("images: expected at least one image, got none")


class UnreadableImage(Image.Image):
    """Takes the place of an image that could not be copied: its owner may go on to its next frame."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def load(self) -> Any:
        """Raise the error of the image."""
        raise self._error


def snapshot(image: ImageInput) -> ImageInput:
    """Copy an image that its owner may write to again, as a generator that fills one array over and over does.

    An image that cannot be used is refused only in its turn, when it is opened.
    """
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, io.BytesIO):
        return image.getvalue()
    try:
        if isinstance(image, np.ndarray | Tensor):
            check_array(image, "image")
        elif isinstance(image, Image.Image):
            check_undecoded(image, "image")
    except (TypeError, ValueError):
        return image
    if isinstance(image, Tensor):
        return image.detach().clone()
    if isinstance(image, np.ndarray):
        return image.copy()
    if isinstance(image, Image.Image):
        # This decodes an image file that was only opened: its owner may close it, or go on to its next frame.
        try:
            _load(image)
            return image.copy()
        except Exception as error:  # noqa: BLE001 raised when the image is opened
            return UnreadableImage(error)
    return image


def open_image(
    image: ImageInput,
    *,
    channels: Channels = None,
    do_rescale: bool = True,
    backend: Backend = "pillow",
    device: torch.device | None = None,
    decode: Decoder = "pillow",
    detach: bool = True,
    name: str = "image",
) -> Tensor:
    """Open one image as RGB, as transformers 5.23's image processors do.

    - Files (paths and encoded bytes) are rotated by their EXIF orientation. Their alpha channel is dropped, a
      transparent colour is composited over white. Of an animation the first frame is opened.
    - PIL images are not rotated. Their transparency is composited over white.
    - Arrays and tensors are `[H, W]`, `[H, W, C]` or `[C, H, W]` with 1, 3 or 4 channels. The fourth channel is alpha
      and is composited over white: in float64 and rounded with `backend="pillow"`, in float32 and truncated with
      `"torch"`.

    Args:
        image: a PIL image, a uint8 array or tensor, a path, or the bytes of an image file.
        channels: the axis of an array's channels. None: inferred from its shape; a shape that could be either is
            refused.
        do_rescale: False for a float32 array or tensor in [0, 1].
        backend: whose arithmetic composites arrays with alpha.
        device: where the image will be needed. An image that is on a GPU goes there directly; any other stays on the
            CPU.
        decode: `"nvjpeg"` decodes JPEG files on `device`, a GPU.
        detach: False: gradients flow from the result to a tensor with `do_rescale=False`.
        name: the image's name in error messages.

    Returns:
        `[3, H, W]`: uint8, or float32 in [0, 1] with `do_rescale=False`. May share memory with `image`.

    Raises:
        TypeError: not an image, or a dtype other than uint8 (float32 with `do_rescale=False`).
        ValueError: an empty, ambiguous or wrongly shaped array, or one without values of its own; a URL; a path of
            something else than a file; a file, or a PIL image opened from one, that is broken, larger than
            `PIL.Image.MAX_IMAGE_PIXELS` or of more than 8 bits a channel; a file in none of `image_file.FORMATS`; a PIL
            image that Pillow would decode with another program.
        OSError: a file that cannot be read.
    """
    if channels not in (None, "first", "last"):
        raise ValueError(f"channels: expected 'first', 'last' or None, got {channels!r}")
    if isinstance(image, np.ndarray | Tensor):
        check_array(image, name)
        tensor = _to_tensor(image.detach() if detach and isinstance(image, Tensor) else image, do_rescale, device, name)
        return _to_rgb(_channels_first(tensor, channels, name), backend)
    if isinstance(image, io.BytesIO | bytearray | memoryview):
        image = image.getvalue() if isinstance(image, io.BytesIO) else bytes(image)
    if not isinstance(image, bytes | str | os.PathLike | Image.Image):
        raise TypeError(
            f"{name}: expected a PIL image, a uint8 array or tensor, a path or bytes, got {type(image).__name__}"
        )
    if not do_rescale:
        raise TypeError(f"{name}: do_rescale=False is for float32 arrays in [0, 1], got an 8-bit image")
    pinned = device is not None and device.type == "cuda"
    if isinstance(image, Image.Image):
        check_undecoded(image, name)
        return _from_pil(image, pinned, name)
    stream, name = open_source(image, name)
    with closing(stream):
        header = read_header(stream, name)
        if (
            decode == "nvjpeg"
            and device is not None
            and (jpeg := decode_jpeg(stream, header, device, name)) is not None
        ):
            return jpeg
        return _from_pil(decode_file(header, name), pinned, name)


def _from_pil(image: Image.Image, pinned: bool, name: str) -> Tensor:
    with naming_broken_files(name):
        _load(image)
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"{name}: expected an image of 8 bits a channel (mode {', '.join(EIGHT_BIT_MODES)}), "
            f"got mode {image.mode!r}; scale its values to 0 to 255 and convert it"
        )
    if 0 in image.size:
        raise ValueError(f"{name}: expected at least one pixel, got {image.width} x {image.height}")
    with naming_broken_files(name):
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode != "RGB":
            image = image.convert("RGB")
    pixels = torch.empty(image.height, image.width, 3, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    np.copyto(pixels.numpy(), np.asarray(image))
    return pixels.permute(2, 0, 1)


def _load(image: Image.Image) -> None:
    """Decode an image whose file was only opened.

    Some of Pillow's decoders return a partial picture when they are asked again after an error. So an error leaves the
    image as it was: asked again, it fails again.
    """
    with _LOADING[id(image) // 16 % len(_LOADING)]:
        before = dict(vars(image))
        try:
            image.load()
        except BaseException:
            vars(image).update(before)
            raise


def check_array(image: NDArray[Any] | Tensor, name: str) -> None:
    """Raise TypeError or ValueError for an array or tensor that is no block of values in memory."""
    if isinstance(image, Tensor):
        kind = "nested" if image.is_nested else "quantised" if image.is_quantized else str(image.layout)
        if kind != "torch.strided":
            raise TypeError(f"{name}: expected a dense tensor, got a tensor that is {kind}; convert it")
        if image.is_meta:
            raise ValueError(f"{name}: expected a tensor with values, got one on the meta device, which has none")
        item, strides = image.element_size(), [stride * image.element_size() for stride in image.stride()]
    else:
        item, strides = image.itemsize, list(image.strides)
    if 0 in image.shape or image.ndim not in (2, 3):
        return
    pixels = math.prod(image.shape) // (min(image.shape) if image.ndim == 3 else 1)
    memory = item + sum((size - 1) * abs(stride) for size, stride in zip(image.shape, strides, strict=True))
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit and memory < pixels:
        raise ValueError(
            f"{name}: expected an array in memory of its own, or of at most {limit} pixels "
            f"(PIL.Image.MAX_IMAGE_PIXELS), got shape {list(image.shape)} in {memory} bytes"
        )


def _to_tensor(image: NDArray[Any] | Tensor, do_rescale: bool, device: torch.device | None, name: str) -> Tensor:
    expected = "uint8" if do_rescale else "float32"
    if (dtype := str(image.dtype).removeprefix("torch.")) != expected:
        to_uint8 = '.round().astype("uint8")' if isinstance(image, np.ndarray) else ".round().to(torch.uint8)"
        hint = f"if its values are in [0, 1], convert it: (x * 255){to_uint8}; or, for an image, convert it "
        hint += "to float32 and pass do_rescale=False"
        if not do_rescale:
            hint = "do_rescale=False is for values in [0, 1]"
        raise TypeError(f"{name}: expected {expected}, got {dtype}; {hint}")
    if isinstance(image, np.ndarray):
        tensor = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    else:
        tensor = image.to(device if image.is_cuda and device is not None else "cpu")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: expected at least one pixel, got shape {list(tensor.shape)}")
    if not do_rescale and not (tensor.min() >= 0 and tensor.max() <= 1):  # also true for NaN
        got = f"{tensor.min():g} to {tensor.max():g}"
        raise ValueError(f"{name}: expected values in [0, 1] with do_rescale=False, got {got}")
    return tensor


def _channels_first(image: Tensor, channels: Channels, name: str) -> Tensor:
    """Return an array in either layout as `[C, H, W]`."""
    shape = list(image.shape)
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        hint = "; pass a list of images" if image.ndim > 3 else ""
        raise ValueError(f"{name}: expected [H, W], [H, W, C] or [C, H, W], got {shape}{hint}")
    fits = {"first": shape[0] in CHANNEL_COUNTS, "last": shape[2] in CHANNEL_COUNTS}
    if channels is None:
        if all(fits.values()):
            raise ValueError(f"{name}: shape {shape} could have its channels first or last; pass channels=")
        channels = "first" if fits["first"] else "last"
    if not fits[channels]:
        raise ValueError(f"{name}: expected 1, 3 or 4 channels, got shape {shape} with channels {channels}")
    return image if channels == "first" else image.permute(2, 0, 1)


def _to_rgb(image: Tensor, backend: Backend) -> Tensor:
    if len(image) == 4:
        return _composite_over_white(image, backend)
    return image.expand(3, -1, -1)


def _composite_over_white(image: Tensor, backend: Backend) -> Tensor:
    """Composite `[4, H, W]` over white to `[3, H, W]`, with the rounding of transformers' processor of that backend."""
    if image.is_floating_point():
        return image[:3] * image[3:] + (1 - image[3:])
    if backend == "pillow":
        # A tensor as divisor: on a GPU, dividing by a number multiplies by its inverse, which rounds differently.
        alpha = image[3:].double() / torch.tensor(255, dtype=torch.float64, device=image.device)
        return (alpha * image[:3] + (1 - alpha) * 255).round().to(torch.uint8)
    scaled = image.float() * (1 / 255)
    return ((scaled[:3] * scaled[3:] + (1 - scaled[3:])) * (256 - 1e-3)).to(torch.uint8)  # as torchvision's to_dtype
