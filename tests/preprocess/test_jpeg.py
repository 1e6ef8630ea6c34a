"""nvJPEG's limits, rotation and hand-over to Pillow, with a stand-in for the GPU."""

import contextlib
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from qwenvit.preprocess import image_file
from qwenvit.preprocess.decode import open_image
from qwenvit.preprocess.image_file import read_header
from qwenvit.preprocess.jpeg import check_decoder, decode_jpeg
from support.pictures import encoded, picture, truncated

JPEG = encoded(picture("RGB"), "JPEG")
CUDA = torch.device("cuda", 0)


def decode(data: bytes, name: str) -> torch.Tensor | None:
    stream = io.BytesIO(data)
    return decode_jpeg(stream, read_header(stream, name), CUDA, name)


class FakeGPU:
    """Stands in for nvJPEG and for the CUDA calls around it; decodes by Pillow into tensors on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr("torchvision.io.decode_jpeg", self.decode)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options | {"pin_memory": False}))

    @contextlib.contextmanager
    def device(self, device: torch.device):
        self.calls.append(f"enter {device}")
        yield
        self.calls.append("exit")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def decode(self, data: torch.Tensor, *, mode: object, device: torch.device) -> torch.Tensor:
        self.calls.append(f"decode {mode.name} on {device}")
        assert (data.dtype, data.ndim) == (torch.uint8, 1)
        image = Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def turned(orientation: int | None, mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    return encoded(picture(mode), "JPEG", exif=exif.tobytes())


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [None, 0, *range(1, 10)])
def test_nvjpeg_images_are_turned_as_pillow_turns_them(
    orientation: int | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, data = FakeGPU(monkeypatch), turned(orientation, mode)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert expected.shape == ((3, 30, 20) if orientation in (5, 6, 7, 8) else (3, 20, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(data, "images[3]"), expected)
        assert torch.equal(open_image(data, device=CUDA, decode="nvjpeg"), expected)
    # The pixels are complete before the reader of the image, on whichever stream, can see them.
    assert gpu.calls == ["enter cuda:0", "decode RGB on cuda:0", "synchronize", "exit"] * 2


@pytest.mark.parametrize(
    "data", [encoded(picture("RGB")), encoded(picture("CMYK"), "JPEG"), encoded(picture("P"), "GIF")]
)
def test_what_nvjpeg_does_not_decode_is_left_to_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    with pytest.warns(UserWarning, match=r"^images\[3\]: not a JPEG file that nvJPEG decodes; Pillow decodes it$"):
        assert decode(data, "images[3]") is None
    with pytest.warns(UserWarning, match="^photo: not a JPEG file"):
        opened = open_image(data, device=CUDA, decode="nvjpeg", name="photo")
    assert torch.equal(opened, open_image(data))
    assert gpu.calls == []


@pytest.mark.parametrize("data", [truncated(JPEG), JPEG[:-200] + bytes(200)])
def test_pillow_names_a_file_that_nvjpeg_refuses(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGPU(monkeypatch)
    with pytest.warns(UserWarning, match="^photo: not a JPEG file"), pytest.raises(ValueError, match=r"^photo: "):
        open_image(data, device=CUDA, decode="nvjpeg", name="photo")


@pytest.mark.parametrize("data", [b"", b"hello", JPEG[:30]])
def test_what_is_no_picture_is_refused_before_nvjpeg(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^photo: (expected an|broken) image file"):
            open_image(data, device=CUDA, decode="nvjpeg", name="photo")
    assert gpu.calls == []


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_nvjpeg_refuses_images_that_pillow_would_refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu, path = FakeGPU(monkeypatch), tmp_path / "bomb.jpg"
    path.write_bytes(JPEG)
    for limit in (599, 150):  # of 600 pixels: where Pillow only warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=rf"^photo \(.*bomb\.jpg\): expected at most {limit} pixels"):
            open_image(path, device=CUDA, decode="nvjpeg", name="photo")
    assert gpu.calls == []
    for limit in (600, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert open_image(path, device=CUDA, decode="nvjpeg").shape == (3, 20, 30)


def test_a_file_of_two_sizes_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, start = FakeGPU(monkeypatch), JPEG.index(b"\xff\xc0")
    header = JPEG[start : start + 19]
    larger = header[:5] + (60000).to_bytes(2, "big") * 2 + header[9:]
    data = JPEG[:start] + larger + JPEG[start:]
    assert Image.open(io.BytesIO(data)).size == (30, 20)  # Pillow goes by the second
    with pytest.warns(UserWarning, match="^photo: not a JPEG file"), pytest.raises(ValueError, match=r"^photo: broken"):
        open_image(data, device=CUDA, decode="nvjpeg", name="photo")
    assert gpu.calls == []


def test_a_file_too_large_to_be_read_at_once_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu, path = FakeGPU(monkeypatch), tmp_path / "large.jpg"
    path.write_bytes(JPEG)
    monkeypatch.setattr(image_file, "MAX_WHOLE_BYTES", len(JPEG) - 1)
    with pytest.warns(UserWarning, match="not a JPEG file"):
        opened = open_image(path, device=CUDA, decode="nvjpeg")
    assert torch.equal(opened, open_image(JPEG))
    assert gpu.calls == []


def test_pictures_of_several_frames_are_decoded_by_nvjpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    data = encoded(picture("RGB"), "MPO", save_all=True, append_images=[picture("RGB").rotate(180)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert torch.equal(open_image(data, device=CUDA, decode="nvjpeg"), open_image(data))
    assert len(gpu.calls) == 4


def test_scaled_floats_are_refused_as_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    with pytest.raises(TypeError, match="got an 8-bit image"):
        open_image(JPEG, device=CUDA, decode="nvjpeg", do_rescale=False)
    assert gpu.calls == []


def test_nvjpeg_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    open_image(JPEG, device=CUDA)
    open_image(JPEG, decode="nvjpeg")
    open_image(Image.open(io.BytesIO(JPEG)), device=CUDA, decode="nvjpeg")  # its owner has opened it by Pillow
    assert gpu.calls == []


def test_decoders_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    check_decoder("pillow", torch.device("cpu"))
    check_decoder("pillow", CUDA)
    check_decoder("nvjpeg", CUDA)
    with pytest.raises(ValueError, match=r"^decode: expected 'pillow' or 'nvjpeg', got 'turbo'$"):
        check_decoder("turbo", CUDA)
    with pytest.raises(ValueError, match=r"^decode: 'nvjpeg' needs a tower on a GPU, got one on cpu$"):
        check_decoder("nvjpeg", torch.device("cpu"))
    for module in ("torchvision", "torchvision.io"):
        monkeypatch.setitem(sys.modules, module, None)
    check_decoder("pillow", CUDA)
    with pytest.raises(ValueError, match=r"^decode: 'nvjpeg' needs torchvision, which cannot be imported: "):
        check_decoder("nvjpeg", CUDA)
