"""Image files: which formats are read, how much of a file, and how many pixels a picture may have."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from qwenvit.weights.regular_file import open_regular

FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "PPM": (".pgm", ".ppm"),
    "PNG": (".png",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "TGA": (".tga",),
}
"""The formats that are read, by Pillow's names, and the suffixes by which folders are searched. TGA is the last to be
tried, because it has no signature."""

SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
"""Modes with 8 bits a channel, which Pillow converts to RGB losing only the alpha."""

PROGRAM_FORMATS = {"EPS": "starts Ghostscript", "IPTC": "starts Ghostscript if it contains EPS"}
"""What Pillow does to decode these formats."""

MAX_WHOLE_BYTES = 64 * 2**20
"""A file of up to this size is read at once, so that nobody can change it under a decoder: libtiff maps a file into
memory, and a process that reads a map of a file cut short meanwhile is killed. Pillow reads a larger file as it needs.
"""
BYTES_PER_PIXEL = 8
"""Of a larger file at most `MAX_WHOLE_BYTES` are read to find a picture, and this many more for each pixel of it."""


class LargeFile:
    """A file that Pillow may read only some bytes of. Its descriptor is for libtiff, which maps what it needs."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self.fileno, self.close = file.seek, file.tell, file.fileno, file.close
        self._read = file.read
        self._bytes_left = MAX_WHOLE_BYTES

    def allow(self, size: int) -> None:
        """Let `size` more bytes be read."""
        self._bytes_left += size

    def read(self, size: int | None = -1) -> bytes:
        """Read as a file does.

        Raises:
            ValueError: no more bytes may be read.
        """
        wanted = size if size is not None and 0 <= size <= self._bytes_left else self._bytes_left + 1
        data = self._read(wanted)
        if len(data) > self._bytes_left:
            raise ValueError("too many bytes for a picture of its size; pass the file's bytes if they are right")
        self._bytes_left -= len(data)
        return data


def open_source(source: bytes | str | os.PathLike[str], name: str) -> tuple[io.BytesIO | LargeFile, str]:
    """Return an image file's bytes as a stream to close, and the name for error messages with the path.

    Raises:
        ValueError: a URL; the path of a folder, a named pipe, a socket or a device.
        OSError: a file that cannot be read.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source), name
    path = os.fspath(source)
    if isinstance(source, str) and ("://" in path or path.startswith("data:")):
        raise ValueError(f"{name}: expected a path, got the URL {path[:80]!r}; download it and pass its bytes")
    try:
        file = open_regular(Path(path))
        try:
            stated = os.fstat(file.fileno()).st_size
            data = file.read(min(stated, MAX_WHOLE_BYTES) + 1) or b""
            if len(data) > stated:  # it grows, or its file system does not know its size
                data += file.read(MAX_WHOLE_BYTES + 1 - len(data)) or b""
        except BaseException:
            file.close()
            raise
    except OSError as error:  # say which of the images it is
        raise type(error)(error.errno, f"{name}: {error.strerror}", path) from error
    except ValueError as error:  # no regular file, a null byte, or characters that no file name has
        raise ValueError(f"{name}: expected the path of an image file, got {path!a}: {error}") from error
    name = f"{name} ({path})"
    if len(data) <= MAX_WHOLE_BYTES:
        file.close()
        return io.BytesIO(data), name
    file.seek(0)
    return LargeFile(file), name


@contextmanager
def naming_broken_files(name: str) -> Iterator[None]:
    """Turn Pillow's errors, which are of almost any type where a file is broken, into ValueErrors.

    A warning of Pillow's is one of these errors where the user's filters make it one.
    """
    try:
        yield
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(error), name) from error
    except Exception as error:
        raise ValueError(f"{name}: broken image file ({type(error).__name__}: {error})") from error


def read_header(stream: io.BytesIO | LargeFile, name: str) -> ImageFile.ImageFile:
    """Return the image in a stream, of which no pixels are decoded yet.

    Pillow warns of a picture of more than `PIL.Image.MAX_IMAGE_PIXELS`, and refuses twice as many. Here both are
    refused.

    Raises:
        ValueError: a file that is in none of `FORMATS`, broken or too large.
    """
    start = stream.read(16)
    Image.init()  # knows then which of the formats this Pillow reads
    with naming_broken_files(name):
        try:
            image = Image.open(stream, formats=[one for one in FORMATS if one in Image.OPEN])  # type: ignore[arg-type]
            # TGA has no signature, so that files of other formats could be taken for it.
            found = Image.open(stream).format if image.format == "TGA" else image.format  # type: ignore[arg-type]
        except UnidentifiedImageError:
            found = None
    if found is None or found != image.format:
        got = f"one of format {found}" if found else f"one that starts with {start!r}" if start else "an empty one"
        raise ValueError(
            f"{name}: expected an image file of format {', '.join(FORMATS)}, got {got}; open another format with "
            "Pillow and pass its image"
        )
    check_pixels(image, name)
    if isinstance(stream, LargeFile):
        stream.allow(BYTES_PER_PIXEL * image.width * image.height)
    return image


def decode_file(image: ImageFile.ImageFile, name: str) -> Image.Image:
    """Decode an image file and rotate it by its EXIF orientation.

    Raises:
        ValueError: a broken file.
    """
    with naming_broken_files(name):
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        # transformers converts files here: this drops an alpha channel but keeps a transparent colour in `info`.
        return image.convert("RGB") if image.mode in EIGHT_BIT_MODES and image.mode != "RGB" else image


def check_undecoded(image: Image.Image, name: str) -> None:
    """Raise ValueError for an image that its user opened with Pillow, if it must not be decoded."""
    if not isinstance(image, ImageFile.ImageFile):
        return
    if image.tile and image.format in PROGRAM_FORMATS:
        raise ValueError(
            f"{name}: expected a decoded image, got {image.format}, whose decoding {PROGRAM_FORMATS[image.format]}; "
            "call the image's load() if you trust it"
        )
    check_pixels(image, name)


def check_pixels(image: Image.Image, name: str) -> None:
    """Raise ValueError for an image of more than `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _too_large(f"{image.width} x {image.height}", name)


def _too_large(got: str, name: str) -> ValueError:
    return ValueError(
        f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels, got more ({got}); if you trust the file, raise "
        "PIL.Image.MAX_IMAGE_PIXELS"
    )
