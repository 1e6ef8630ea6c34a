"""Decoding JPEG files on a GPU, by nvJPEG through torchvision."""

import io
import warnings
from typing import Literal

import torch
from PIL import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from qwenvit.preprocess.image_file import LargeFile

Decoder = Literal["pillow", "nvjpeg"]
"""What decodes JPEG files. nvJPEG is fast, and differs from Pillow by tens of levels where colours change sharply: it
is never a default."""

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}
"""By EXIF orientation: whether to exchange rows and columns of `[C, H, W]`, and which axes to reverse then."""


def check_decoder(decode: Decoder, device: torch.device) -> None:
    """Raise ValueError unless `decode` is a decoder that can run for images on this device."""
    if decode not in ("pillow", "nvjpeg"):
        raise ValueError(f"decode: expected 'pillow' or 'nvjpeg', got {decode!r}")
    if decode == "nvjpeg":
        if device.type != "cuda":
            raise ValueError(f"decode: 'nvjpeg' needs a tower on a GPU, got one on {device}")
        try:
            import torchvision.io  # type: ignore[import-untyped]  # noqa: F401  an optional package
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            raise ValueError(f"decode: 'nvjpeg' needs torchvision, which cannot be imported: {error}") from error


def decode_jpeg(
    stream: io.BytesIO | LargeFile, header: ImageFile.ImageFile, device: torch.device, name: str
) -> Tensor | None:
    """Decode a JPEG file on a GPU and rotate it by its EXIF orientation.

    Args:
        stream: the file.
        header: what `read_header` read of it.
        device: a CUDA device.
        name: the image's name in the warning.

    Returns:
        `[3, H, W]` uint8 on the device, complete on every stream; None, with a warning, for what nvJPEG does not
        decode: another format, CMYK, a broken file, a file larger than `MAX_WHOLE_BYTES`.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        # A file with two frame headers has two sizes, of which nvJPEG might take the one that was not checked.
        if isinstance(header, JpegImageFile) and header.mode in ("RGB", "L") and len(header.layer) == header.layers:
            orientation = header.getexif().get(EXIF_ORIENTATION, 1)
            if isinstance(stream, io.BytesIO):
                encoded = torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)
                with torch.cuda.device(device):
                    image = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
                    swap, axes = UPRIGHT.get(orientation, (False, ()))
                    image = (image.transpose(1, 2) if swap else image).flip(axes)
                    torch.cuda.current_stream().synchronize()
                return image
    except Exception:  # noqa: BLE001  Pillow decodes the file or says what is wrong with it
        pass
    warnings.warn(f"{name}: not a JPEG file that nvJPEG decodes; Pillow decodes it", stacklevel=2)
    return None
