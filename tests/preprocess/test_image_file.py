"""Image files against Pillow's own reading of them: what is read, how much of it, and what is refused."""

import io
import os
import re
import socket
import stat
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageFile, PngImagePlugin

from qwenvit.preprocess import image_file
from qwenvit.preprocess.decode import open_image, snapshot
from qwenvit.preprocess.image_file import FORMATS, SUFFIXES
from support.pictures import as_tensor, by_pillow, encoded, iptc_of, picture, picture_files

FILES = picture_files()
LISTED = [key for key in FILES if key[0] in FORMATS]
OTHERS = [key for key in FILES if key[0] not in {*FORMATS, "MPO"}]


def outcome(function: Callable[[], object]) -> object:
    """Return what a function returns, or ValueError if it raises that."""
    try:
        return function()
    except ValueError:
        return ValueError


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return one is other


def finishes(function: Callable[[], object]) -> object:
    """Return a function's outcome, and fail if it takes for ever."""
    results = []
    thread = threading.Thread(target=lambda: results.append(outcome(function)), daemon=True)
    thread.start()
    thread.join(20)
    assert results, "hangs"
    return results[0]


@pytest.mark.parametrize("kind", ["pipe", "link-to-pipe", "socket", "device", "folder"])
def test_a_path_of_something_else_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path, name = tmp_path / "photo.png", {"link-to-pipe": "named pipe", "pipe": "named pipe"}.get(kind, kind)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link-to-pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.mkdir()
    assert finishes(lambda: open_image(path)) is ValueError
    message = rf"^images\[7\]: .*{re.escape(str(path))}: expected a regular file, got a {name}"
    with pytest.raises(ValueError, match=message):
        open_image(str(path), name="images[7]")


def test_system_errors_name_the_image_and_keep_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "missing.png"
    with pytest.raises(FileNotFoundError, match=r"images\[7\]: ") as raised:
        open_image(path, name="images[7]")
    assert (raised.value.errno, raised.value.filename) == (2, str(path))
    assert type(raised.value.__cause__) is FileNotFoundError


def test_names_that_no_file_has_are_refused() -> None:
    for name in ("a\0b.png", "\udcff\ud800.png"):
        with pytest.raises(ValueError, match=r"^image: expected the path of an image file, got '"):
            open_image(name)


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(FILES["PNG", "RGB"])
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert torch.equal(open_image(tmp_path / "b.png"), open_image(FILES["PNG", "RGB"]))


def test_folders_are_searched_for_the_formats_that_are_read() -> None:
    registered = Image.registered_extensions()
    assert {suffix: registered[suffix] for suffix in SUFFIXES} == {
        suffix: kind for kind, suffixes in FORMATS.items() for suffix in suffixes
    }


@pytest.mark.parametrize(("kind", "mode"), LISTED)
def test_listed_formats_are_read_as_pillow_reads_them(kind: str, mode: str, tmp_path: Path) -> None:
    data, path = FILES[kind, mode], tmp_path / "image"
    path.write_bytes(data)
    if Image.open(path).mode.startswith("I"):
        with pytest.raises(ValueError, match=r"8 bits a channel .*got mode 'I"):
            open_image(path)
    else:
        for source in (path, data):
            assert torch.equal(open_image(source), by_pillow(Image.open(path), is_file=True))


@pytest.mark.parametrize(("kind", "mode"), [key for key in LISTED if key[1] != "I;16"])
def test_large_files_are_read_as_pillow_reads_them(
    kind: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large"
    path.write_bytes(FILES[kind, mode] + bytes(2**18))
    monkeypatch.setattr(image_file, "MAX_WHOLE_BYTES", 2**18)
    if kind in ("AVIF", "WEBP"):  # Pillow reads all of them
        with pytest.raises(ValueError, match=r"broken image file .*too many bytes for a picture of its size; pass"):
            open_image(path)
    else:
        assert torch.equal(open_image(path), by_pillow(Image.open(path), is_file=True))


@pytest.mark.parametrize(("kind", "mode"), OTHERS)
def test_other_formats_are_refused_unless_the_user_opens_them(kind: str, mode: str) -> None:
    data, image = FILES[kind, mode], Image.open(io.BytesIO(FILES[kind, mode]))
    with pytest.raises(ValueError, match=rf"^photo: expected an image file of format {', '.join(FORMATS)}, got one"):
        open_image(data, name="photo")
    if kind not in image_file.PROGRAM_FORMATS and image.mode in image_file.EIGHT_BIT_MODES and "A" not in image.mode:
        assert torch.equal(open_image(image), as_tensor(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_large_file_of_which_only_the_start_is_a_picture_is_not_read(kind: str, tmp_path: Path) -> None:
    path, picture_at_start = tmp_path / "large", FILES[kind, "RGB"]
    path.write_bytes(picture_at_start)
    os.truncate(path, 3 * 2**30)  # a hole, which takes no space
    expected = ValueError if kind in ("AVIF", "WEBP") else open_image(picture_at_start)
    tracemalloc.start()
    try:
        assert equal(finishes(lambda: open_image(path)), expected)
        assert tracemalloc.get_traced_memory()[1] < 3 * image_file.MAX_WHOLE_BYTES
    finally:
        tracemalloc.stop()


def test_a_large_file_may_not_claim_what_no_picture_has(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    png = FILES["PNG", "RGB"]
    path.write_bytes(png[:33] + (2**31 - 1).to_bytes(4, "big") + b"tEXt")  # a text of 2 GB after the header
    os.truncate(path, 3 * 2**30)
    with pytest.raises(ValueError, match="too many bytes for a picture of its size"):
        open_image(path)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program `gs` in the path that leaves a file, and return that file."""
    mark, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{mark}'\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


EPS = FILES["EPS", "RGB"]


@pytest.mark.parametrize("data", [EPS, iptc_of(EPS)], ids=["EPS", "IPTC"])
def test_no_file_starts_ghostscript(data: bytes, ghostscript: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    for source in (path, data, io.BytesIO(data)):
        with pytest.raises(ValueError, match="expected an image file of format BMP"):
            open_image(source)
    for opened in (Image.open(path), snapshot(Image.open(path))):
        with pytest.raises(ValueError, match=r"^photo: expected a decoded image, got (EPS|IPTC), .*Ghostscript"):
            open_image(opened, name="photo")
    assert not ghostscript.exists()
    with pytest.raises((OSError, CalledProcessError)):
        Image.open(path).load()
    assert ghostscript.exists()


def test_an_eps_that_the_user_has_decoded_is_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: picture("RGB").im)
    image = Image.open(io.BytesIO(EPS))
    image.load()
    assert torch.equal(open_image(image), open_image(picture("RGB")))


def damaged(data: st.DataObject, file: bytes) -> bytes:
    """Draw damage: some bytes are changed, and the end may be cut off."""
    broken = bytearray(file)
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), max_size=8)):
        broken[place] = data.draw(st.integers(0, 255))
    return bytes(broken[: data.draw(st.one_of(st.just(len(broken)), st.integers(0, len(broken))))])


@pytest.fixture(scope="module")
def few_pixels() -> object:
    """Let damaged headers not cost gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        yield


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(LISTED), st.data())
def test_a_damaged_file_is_refused_where_pillow_refuses_it(
    few_pixels: object, key: tuple[str, str], data: st.DataObject
) -> None:
    broken = damaged(data, FILES[key])
    try:
        truth = by_pillow(Image.open(io.BytesIO(broken), formats=list(FORMATS)), is_file=True)
    except Exception:  # noqa: BLE001 of any type
        truth = ValueError
    assert equal(outcome(lambda: open_image(broken)), truth)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None)
@given(st.sampled_from([key for key in FILES if key[0] != "EPS"]), st.data())
def test_a_damaged_image_that_the_user_opened_is_refused_where_pillow_refuses_it(
    few_pixels: object, key: tuple[str, str], data: st.DataObject
) -> None:
    broken = damaged(data, FILES[key])
    try:
        image, truth = Image.open(io.BytesIO(broken)), by_pillow(Image.open(io.BytesIO(broken)), is_file=False)
    except Exception:  # noqa: BLE001 the user has no image
        return
    # Pillow itself gives a partial picture for some when it is asked a second time.
    assert [equal(outcome(lambda: open_image(image)), truth) for _ in range(3)] == [True] * 3
    copy = snapshot(Image.open(io.BytesIO(broken)))
    assert equal(outcome(lambda: open_image(copy)), truth)


@pytest.mark.parametrize("error", [SyntaxError, RuntimeError, EOFError, KeyError, AssertionError, RecursionError])
def test_an_error_of_any_type_is_a_value_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> None:
        raise error("no")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    for image in (FILES["PNG", "RGB"], Image.open(io.BytesIO(FILES["PNG", "RGB"]))):
        for one in (image, snapshot(image)):
            with pytest.raises(ValueError, match=rf"^photo: broken image file \({error.__name__}: .?no"):
                open_image(one, name="photo")


def test_a_frame_that_cannot_be_copied_is_not_replaced_by_the_next() -> None:
    frames = [picture("RGB"), picture("RGB").rotate(180)]
    data = bytearray(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:], compression="tiff_lzw"))
    first = Image.open(io.BytesIO(bytes(data))).tag_v2[273][0]
    data[first : first + 400] = bytes(400)
    animation = Image.open(io.BytesIO(bytes(data)))
    copy = snapshot(animation)
    animation.seek(1)
    assert torch.equal(open_image(animation), open_image(frames[1]))
    with pytest.raises(ValueError, match=r"^x: broken image file"):
        open_image(copy, name="x")


@pytest.mark.parametrize("limit", [599, 150])  # of 600 pixels: where Pillow only warns, and where it raises
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_one_limit_for_files_bytes_and_images(limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(FILES["PNG", "RGB"])
    opened, copy = Image.open(path), Image.open(path).copy()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for source in (path, path.read_bytes(), opened, snapshot(opened)):
        with pytest.raises(ValueError, match=rf"^photo.*at most {limit} pixels.*raise PIL.Image.MAX_IMAGE_PIXELS"):
            open_image(source, name="photo")
    assert opened.tile, "decoded"
    assert torch.equal(open_image(copy), as_tensor(copy))  # is in memory already
    for enough in (600, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", enough)
        assert all(torch.equal(open_image(one), as_tensor(copy)) for one in (path, path.read_bytes(), opened))


def test_pillows_warnings_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    palette = picture("P")
    palette.info["transparency"] = bytes(range(0, 256, 4))
    images = {
        "palette": encoded(palette, transparency=palette.info["transparency"]),
        "exif": encoded(picture("RGB"), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\1"),
        "tiff": FILES["TIFF", "RGB"][:-40],
    }
    for data in images.values():
        with warnings.catch_warnings(record=True) as expected:
            warnings.simplefilter("always")
            truth = by_pillow(Image.open(io.BytesIO(data)), is_file=True)
        with warnings.catch_warnings(record=True) as got:
            warnings.simplefilter("always")
            assert equal(outcome(lambda data=data: open_image(data)), truth)
        assert [str(one.message) for one in got] == [str(one.message) for one in expected]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^photo: broken image file \(UserWarning"):
            open_image(images["exif"], name="photo")


def test_users_settings_of_pillow_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = FILES["JPEG", "RGB"][:-100]
    with pytest.raises(ValueError, match="truncated"):
        open_image(cut)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert torch.equal(open_image(cut), as_tensor(Image.open(io.BytesIO(cut))))


def test_an_icon_that_looks_like_tga_is_an_icon() -> None:
    fields = ((1, 2), (32, 2), (8 << 16 | 16, 4), (22, 4))  # planes, bits, length and place of its PNG
    entry = bytes([30, 20, 0, 0]) + b"".join(value.to_bytes(size, "little") for value, size in fields)
    icon = b"\0\0\1\0\1\0" + entry + FILES["PNG", "RGB"]
    assert Image.open(io.BytesIO(icon)).format == "ICO"
    assert Image.open(io.BytesIO(icon), formats=["TGA"]).format == "TGA"
    with pytest.raises(ValueError, match=r"^image: expected an image file of format BMP.*, got one of format ICO"):
        open_image(icon)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs files that state no size")
def test_a_file_that_states_no_size_is_read() -> None:
    with pytest.raises(ValueError, match=r"got one that starts with b'Name:"):
        open_image("/proc/self/status")
