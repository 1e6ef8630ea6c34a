"""Pictures of noise in every mode, their files, and what Pillow makes of a file."""

import io
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps

from qwenvit.preprocess.image_file import EIGHT_BIT_MODES


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


def picture(mode: str) -> Image.Image:
    if mode in ("P", "PA"):
        image = Image.fromarray(noise(20, 30, 3)).quantize(64)
        if mode == "P":
            return image
        alpha = Image.fromarray(noise(20, 30))
        return Image.merge("LA", [Image.fromarray(np.asarray(image)), alpha]).convert("PA")
    if mode == "1":
        return Image.fromarray(noise(20, 30)).convert("1")
    return Image.frombytes(mode, (30, 20), noise(20, 30, len(Image.new(mode, (1, 1)).getbands())).tobytes())


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 9 // 10]


def picture_files() -> dict[tuple[str, str], bytes]:
    """Return a file of each format and mode that Pillow can write and read again."""
    Image.init()
    files = {}
    for kind in sorted(set(Image.SAVE) - {"BUFR", "GRIB", "HDF5", "WMF", "PDF", "PALM"}):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
            image = Image.new("I;16", (30, 20), 999) if mode == "I;16" else picture(mode)
            with suppress(OSError, ValueError, SystemError):
                files[kind, mode] = encoded(image, kind)
    return files


def iptc_of(content: bytes) -> bytes:
    """Return an IPTC file that contains another file, which it calls a JPEG."""
    fields = {
        (3, 20): (30).to_bytes(4, "big"),
        (3, 30): (20).to_bytes(4, "big"),
        (3, 60): b"\x01\x00",
        (3, 120): b"\x05",
    }
    return b"".join(
        bytes([0x1C, *key, 128 + 4, 0]) + len(value).to_bytes(4, "big") + value
        for key, value in (fields | {(8, 10): content}).items()
    )


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def by_pillow(image: Image.Image, is_file: bool) -> torch.Tensor | type[ValueError]:
    """Return what Pillow makes of an image, or ValueError where it fails or the image is not for us."""
    try:
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            return ValueError
        image.load()
        if is_file:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode not in EIGHT_BIT_MODES:
            return ValueError
        if is_file:
            image = image.convert("RGB")
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return as_tensor(image)
    except Exception:  # noqa: BLE001 of any type
        return ValueError
