"""Opening images against transformers' processors and loader, and what is refused."""

import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil
from transformers.image_utils import load_image

from qwenvit.preprocess.decode import EIGHT_BIT_MODES, each_image, open_image, snapshot
from support.pictures import encoded, noise, picture, truncated
from support.pinned import needs_pinned_transformers

HF_PROCESSORS = {"pillow": Qwen2VLImageProcessorPil(), "torch": Qwen2VLImageProcessor()}
BACKENDS = sorted(HF_PROCESSORS)


def unit_floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).random(shape, np.float32)


def hf_open(image: object, backend: str, layout: str | None = None) -> torch.Tensor:
    return torch.as_tensor(HF_PROCESSORS[backend].process_image(image, do_convert_rgb=True, input_data_format=layout))


@needs_pinned_transformers
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", EIGHT_BIT_MODES)
def test_pil_images_are_as_in_transformers(mode: str, backend: str) -> None:
    image = picture(mode)
    opened = open_image(image, backend=backend)
    assert (opened.dtype, opened.shape) == (torch.uint8, (3, 20, 30))
    assert torch.equal(opened, hf_open(image, backend))


@needs_pinned_transformers
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 4))])
def test_palette_transparency_is_composited_over_white(transparency: int | bytes, backend: str) -> None:
    image = picture("P")
    image.info["transparency"] = transparency
    opened = open_image(image, backend=backend)
    assert torch.equal(opened, hf_open(image, backend))
    assert (opened[:, torch.from_numpy(np.array(image)) == (3 if transparency == 3 else 0)] == 255).all()


@needs_pinned_transformers
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("wrap", [np.asarray, torch.from_numpy])
def test_arrays_are_as_in_transformers(wrap, count: int, channels: str, backend: str) -> None:
    array = wrap(noise(count, 64, 80) if channels == "first" else noise(64, 80, count))
    expected = hf_open(array, backend, f"channels_{channels}")
    assert torch.equal(open_image(array, channels=channels, backend=backend), expected)
    assert torch.equal(open_image(array, backend=backend), expected)  # inferred


@needs_pinned_transformers
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_alpha_over_white_is_as_in_transformers(backend: str) -> None:
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    array = np.stack([value, value, value, alpha])
    assert torch.equal(open_image(array, backend=backend), hf_open(array, backend))


@needs_pinned_transformers
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_floats_with_alpha_are_as_in_transformers(backend: str) -> None:
    array = unit_floats(64, 80, 4)
    opened = open_image(array, do_rescale=False, backend=backend)
    assert opened.dtype == torch.float32
    assert torch.equal(opened, hf_open(array, backend))


def test_arrays_of_any_memory_layout() -> None:
    array = noise(40, 50, 3)
    upside_down = array[::-1, ::2]
    upside_down.flags.writeable = False
    assert torch.equal(open_image(upside_down), torch.tensor(upside_down.copy()).permute(2, 0, 1))
    assert torch.equal(open_image(array[..., 0]), torch.from_numpy(array[..., 0]).expand(3, -1, -1))
    assert torch.equal(open_image(np.asfortranarray(array)), torch.from_numpy(array).permute(2, 0, 1))


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "array",
    [
        read_only(noise(40, 50, 3)),
        read_only(noise(3, 40, 50)),
        read_only(noise(40, 50)),
        read_only(noise(40, 50, 4)),
        np.frombuffer(noise(40, 50, 3).tobytes(), np.uint8).reshape(40, 50, 3),
        np.broadcast_to(noise(50, 3), (40, 50, 3)),
        read_only(unit_floats(40, 50, 3)),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_a_read_only_array_is_copied_without_a_warning(array: np.ndarray) -> None:
    expected, always = torch.tensor(array), torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch warns of memory that is not writable only the first time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = open_image(array, do_rescale=array.dtype == np.uint8)
    finally:
        torch.set_warn_always(always)
    assert torch.equal(opened, open_image(expected, do_rescale=array.dtype == np.uint8))
    opened[:, :1].zero_()
    assert torch.equal(torch.tensor(array), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_files_equal_what_transformers_loads(mode: str, orientation: int | None, tmp_path: Path) -> None:
    image, exif = picture(mode), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image, exif=exif.tobytes()))
    expected = torch.from_numpy(np.array(load_image(str(path)))).permute(2, 0, 1)
    assert expected.shape == ((3, 30, 20) if orientation in (6, 8) else (3, 20, 30))
    for source in (path, str(path), path.read_bytes()):
        assert torch.equal(open_image(source), expected)


@needs_pinned_transformers
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mode", "colour"), [("P", 0), ("P", bytes(range(0, 256, 8))), ("L", 40), ("RGB", (9, 8, 7))])
def test_files_with_a_transparent_colour(mode: str, colour: object, backend: str, tmp_path: Path) -> None:
    image = picture(mode)
    if mode != "P":
        image.putpixel((3, 4), colour)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image, transparency=colour))
    assert torch.equal(open_image(path, backend=backend), hf_open(load_image(str(path)), backend))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(kind: str) -> None:
    data = encoded(picture("RGB"), kind)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(open_image(data), torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pil_images_keep_their_exif_orientation_unapplied(backend: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(picture("RGB"), "JPEG", exif=exif.tobytes())))
    assert ImageOps.exif_transpose(image).size == (20, 30)
    assert torch.equal(open_image(image, backend=backend), hf_open(image, backend))
    assert open_image(image).shape == (3, 20, 30)


def blank(mode: str) -> Image.Image:
    return Image.new(mode, (4, 4))


JPEG = encoded(picture("RGB"), "JPEG")
REFUSED = {
    "ambiguous": (
        noise(3, 3, 3),
        ValueError,
        r"shape \[3, 3, 3\] could have its channels first or last; pass channels",
    ),
    "ambiguous-wide": (noise(3, 50, 3), ValueError, "pass channels="),
    "channels": (noise(5, 6, 2), ValueError, r"expected 1, 3 or 4 channels, got shape \[5, 6, 2\]"),
    "batch": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, "pass a list"),
    "ndim": (noise(7), ValueError, r"expected \[H, W\].* got \[7\]"),
    "empty": (noise(0, 8, 3), ValueError, "expected at least one pixel"),
    "empty-pil": (Image.new("RGB", (0, 8)), ValueError, "expected at least one pixel, got 0 x 8"),
    "uint16": (noise(8, 8, 3).astype(np.uint16), TypeError, "expected uint8, got uint16"),
    "float": (torch.rand(3, 8, 8), TypeError, "expected uint8, got float32; .* do_rescale=False"),
    "float64": (
        unit_floats(8, 8, 3).astype(np.float64),
        TypeError,
        "expected uint8, got float64; .* convert it to float32",
    ),
    "bool": (noise(8, 8, 3) > 9, TypeError, "expected uint8, got bool"),
    "16-bit": (blank("I;16"), ValueError, "8 bits a channel .* got mode 'I;16'"),
    "32-bit": (blank("I"), ValueError, "got mode 'I'"),
    "float-pil": (blank("F"), ValueError, "got mode 'F'"),
    "16-bit-file": (encoded(blank("I;16")), ValueError, "got mode 'I(;16)?'"),  # Pillow 10 says I
    "url": ("https://example.com/a.png", ValueError, "got the URL .* download it"),
    "data-url": ("data:image/png;base64,AAAA", ValueError, "got the URL"),
    "missing": ("no/such/file.png", FileNotFoundError, r"file\.png"),
    "not-an-image": (b"hello", ValueError, "expected an image file of format BMP.*, got one that starts with b'hello'"),
    "no-bytes": (b"", ValueError, "got an empty one"),
    "truncated-jpeg": (truncated(JPEG), ValueError, "broken image file"),
    "truncated-png": (truncated(encoded(picture("RGB"))), ValueError, "broken image file"),
    "truncated-pil": (Image.open(io.BytesIO(truncated(JPEG))), ValueError, "broken image file"),
    "none": (None, TypeError, "expected a PIL image.* got NoneType"),
    "nested": ([noise(8, 8, 3)], TypeError, "got list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    image, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        open_image(image, name="images[7]")
    if kind is not FileNotFoundError:
        with pytest.raises(kind, match=r"^images\[7\]"):
            open_image(image, name="images[7]")


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (noise(8, 8, 3), TypeError, "expected float32, got uint8; do_rescale=False is for"),
        (picture("RGB"), TypeError, "float32 arrays in .* got an 8-bit image"),
        (JPEG, TypeError, "got an 8-bit image"),
        (torch.full((3, 8, 8), 1.5), ValueError, "got 1.5 to 1.5"),
        (torch.full((3, 8, 8), -0.1), ValueError, "got -0.1 to -0.1"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "got nan to nan"),
        (torch.rand(3, 8, 8).double(), TypeError, "expected float32, got float64"),
    ],
)
def test_refused_as_scaled(image: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        open_image(image, do_rescale=False)


def test_stated_channels_must_fit() -> None:
    with pytest.raises(ValueError, match="with channels first"):
        open_image(noise(20, 30, 3), channels="first")
    with pytest.raises(ValueError, match="channels: expected 'first', 'last' or None, got 'BGR'"):
        open_image(noise(20, 30, 3), channels="BGR")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_the_layout_is_inferred_only_from_unambiguous_shapes(a: int, b: int, c: int) -> None:
    array = noise(a, b, c)
    first, last = a in (1, 3, 4), c in (1, 3, 4)
    if first == last:
        with pytest.raises(ValueError, match="channels"):
            open_image(array)
    else:
        assert open_image(array).shape == ((3, b, c) if first else (3, a, b))


def test_one_image_or_several() -> None:
    one = noise(8, 8, 3)
    for single in ("a.png", b"bytes", bytearray(b"bytes"), io.BytesIO(b"bytes"), Path("a.png"), one):
        assert [image is single for image in each_image(single)] == [True]
    assert list(each_image(("a.png", "b.png"))) == ["a.png", "b.png"]
    for bad, error, message in (
        ([], ValueError, "at least one image"),
        (noise(2, 8, 8, 3), ValueError, r"got one array \[2, 8, 8, 3\]; pass list\(images\)"),
        (3, TypeError, "got int"),
        ({"image": one}, TypeError, "got dict"),
    ):
        with pytest.raises(error, match=message):
            list(each_image(bad))


def test_a_generator_is_drawn_one_image_at_a_time() -> None:
    drawn = []
    images = each_image(drawn.append(i) or noise(8, 8, 3) for i in range(5))
    next(images)
    assert drawn == [0]


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, io.BytesIO])
def test_encoded_images_in_any_buffer(wrap: type) -> None:
    data = encoded(picture("RGB"))
    assert torch.equal(open_image(wrap(data)), open_image(picture("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_threads_may_share_an_unread_pil_image(kind: str) -> None:
    data = encoded(Image.fromarray(noise(300, 400, 3)), kind)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            image, start = Image.open(io.BytesIO(data)), threading.Barrier(8)  # Pillow reads the pixels at first use

            def open_with_others(image: Image.Image = image, start: threading.Barrier = start) -> torch.Tensor:
                start.wait()
                return open_image(image)

            opened = [thread.result() for thread in [threads.submit(open_with_others) for _ in range(8)]]
            assert all(torch.equal(one, expected) for one in opened)


def test_a_snapshot_does_not_change_with_its_original() -> None:
    data = encoded(picture("RGB"))
    array, tensor = noise(8, 8, 3), torch.from_numpy(noise(9, 8, 3))
    buffer, window, stream = bytearray(data), bytearray(data), io.BytesIO(data)
    originals = [array, array[::2, :, :1], tensor, tensor.requires_grad_(False)[2:], buffer, memoryview(window), stream]
    before = [open_image(one, channels="last") for one in originals]
    before = [one.clone() for one in before]
    copies = [snapshot(one) for one in originals]
    array[:], buffer[:], window[:] = 0, bytes(len(data)), bytes(len(data))
    tensor.zero_()
    stream.getbuffer()[:] = bytes(len(data))
    for copy, expected in zip(copies, before, strict=True):
        assert torch.equal(open_image(copy, channels="last"), expected)


def test_a_snapshot_does_not_open_files(tmp_path: Path) -> None:
    for image in (JPEG, "no/such/file.png", tmp_path / "missing.png"):
        assert snapshot(image) is image


def test_a_snapshot_of_an_opened_file_outlives_it() -> None:
    with Image.open(io.BytesIO(JPEG)) as opened:
        copy = snapshot(opened)
    assert torch.equal(open_image(copy), open_image(JPEG))
    broken = Image.open(io.BytesIO(JPEG[:-30]))
    with pytest.raises(ValueError, match=r"^x: broken image file"):
        open_image(snapshot(broken), name="x")
