"""Damaged image files, and what is no image file: held against Pillow's own reading of the same bytes."""

import functools
import io
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import EpsImagePlugin, Image

from fuzz.frame import Case, DifferentError
from fuzz.image_damage import DAMAGES, blank, damaged
from qwenvit.preprocess.decode import open_image, snapshot
from qwenvit.preprocess.image_file import FORMATS, PROGRAM_FORMATS, SUFFIXES
from support.pictures import by_pillow, encoded, picture, picture_files

DOCUMENTED = (ValueError, TypeError, OSError)
MAX_PIXELS = 2**24
"""Memory grows with the picture, up to Pillow's limit, which is lowered to this."""
SOURCES = ("bytes", "bytearray", "stream", "path", "opened image", "copy of an opened image", "decoded image")


def cases(seed: int, count: int) -> Iterator[Case]:
    """Yield damaged files, and one in eight times something that is no image file."""
    _set_up()
    keys = sorted(_files())
    for index in range(count):
        random = Random(f"{seed}/{index}")
        if random.random() < 1 / 8:
            yield random.choice(_others())
            continue
        damage, source = random.choice(DAMAGES), random.choice(SOURCES)
        one, other = random.choice(keys), random.choice(keys)
        run = functools.partial(_run_damage, random, damage, source, _files()[one], _files()[other])
        yield Case(f"{damage}: {'/'.join(one)} with {'/'.join(other)} as {source}", run)


@functools.cache
def _set_up() -> None:
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    EpsImagePlugin.Ghostscript = lambda *_, **__: os._exit(9)  # counted as a crash


@functools.cache
def _files() -> dict[tuple[str, str], bytes]:
    return picture_files()


def _run_damage(random: Random, damage: str, source: str, data: bytes, other: bytes, folder: Path) -> None:
    broken = damaged(damage, random, data, other)
    path = folder / f"photo{random.choice(sorted(SUFFIXES))}"
    path.write_bytes(broken)
    if source in ("bytes", "bytearray", "stream", "path"):
        given = {"bytes": broken, "bytearray": bytearray(broken), "stream": io.BytesIO(broken), "path": path}[source]
        _check(given, _truth_of_file(broken))
        return
    try:
        image, twin = Image.open(path), Image.open(path)
        if source == "decoded image" and image.format not in PROGRAM_FORMATS:
            image.load()
    except Exception as error:
        raise ValueError("the user has no image") from error
    truth = ValueError if image.format in PROGRAM_FORMATS else by_pillow(twin, is_file=False)
    _check(snapshot(image) if source == "copy of an opened image" else image, truth)


def _truth_of_file(data: bytes) -> Any:
    try:
        image = Image.open(io.BytesIO(data), formats=[one for one in FORMATS if one in Image.OPEN])
        # TGA has no signature: a file of another format may look like one.
        if image.format == "TGA" and Image.open(io.BytesIO(data)).format != "TGA":
            return ValueError
    except Exception:  # noqa: BLE001 of any type
        return ValueError
    return by_pillow(image, is_file=True)


def _others() -> list[Case]:
    others = [Case(name, lambda folder, make=make: _check(make(folder))) for name, make in PATHS.items()]
    others += [Case(name, lambda _, make=make: _check(make())) for name, make in OBJECTS.items()]
    for kind in FORMATS:
        start = encoded(picture("RGB"), kind)
        others.append(Case(f"{kind} at the start of 3 GB", functools.partial(_run_start, kind, start)))
        others.append(Case(f"half {kind} at the start of 3 GB", functools.partial(_run_start, kind, start[:900])))
    return others


def _run_start(kind: str, start: bytes, folder: Path) -> None:
    # Pillow reads the whole file for two formats, which is refused.
    truth = ValueError if kind in ("AVIF", "WEBP") else _truth_of_file(start + bytes(10_000))
    _check(_large(folder, start), truth)


def _check(given: Any, truth: Any = ValueError) -> None:
    """Open something twice, and hold what comes against its pixels, or against ValueError if it must be refused."""
    for _ in range(2):
        try:
            opened, refused = open_image(given), None
        except DOCUMENTED as error:
            opened, refused = None, error
        if opened is None and isinstance(truth, torch.Tensor):
            raise DifferentError(f"refused, but Pillow reads it: {refused}")
        if opened is not None and (truth is ValueError or not torch.equal(opened, truth)):
            raise DifferentError("other pixels than Pillow's" if truth is not ValueError else "must be refused")
    if refused is not None:
        raise refused


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "photo.png")
    return folder / "photo.png"


def _socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s"))
    return folder / "s"


def _link(folder: Path, target: str) -> Path:
    (folder / "photo.png").symlink_to(target)
    return folder / "photo.png"


def _large(folder: Path, start: bytes) -> Path:
    """Write a file of 3 GB, almost all of it a hole."""
    (folder / "photo.png").write_bytes(start)
    os.truncate(folder / "photo.png", 3 * 2**30)
    return folder / "photo.png"


def _closed() -> Image.Image:
    with Image.open(io.BytesIO(encoded(picture("RGB"), "JPEG"))) as image:
        pass
    image.close()
    return image


class _Failing(Image.Image):
    def load(self) -> None:
        raise RuntimeError("no")


PATHS: dict[str, Callable[[Path], Any]] = {
    "named pipe": _pipe,
    "link to a named pipe": lambda folder: _link(folder, str(_pipe(folder).rename(folder / "pipe"))),
    "socket": _socket,
    "folder": lambda folder: folder,
    "link to a device": lambda folder: _link(folder, "/dev/zero"),
    "link to nothing": lambda folder: _link(folder, "absent"),
    "link to itself": lambda folder: _link(folder, "photo.png"),
    "no file": lambda folder: folder / "absent.png",
    "folder in a file": lambda folder: _large(folder, b"") / "photo.png",
    "3 GB of zeros": lambda folder: _large(folder, b""),
    "3 GB of a PNG's text": lambda folder: _large(folder, encoded(picture("RGB"))[:33] + b"\x7f\xff\xff\xfftEXt"),
    "3 GB after 400 million pixels": lambda folder: _large(folder, blank(Random(0), 20_000)),
    "open file": lambda folder: (folder / "file").open("wb"),
}
"""What is in a folder and no image file."""

OBJECTS: dict[str, Callable[[], Any]] = {
    "device without end": lambda: "/dev/zero",
    "device without content": lambda: "/dev/null",
    "file of the kernel": lambda: "/proc/self/maps",
    "name with a null": lambda: "photo\0.png",
    "name with half a surrogate pair": lambda: "photo\ud800.png",
    "name too long": lambda: "x" * 5000,
    "no name": lambda: "",
    "URL": lambda: "https://example.invalid/photo.png",
    "URL of data": lambda: "data:image/png;base64,AAAA",
    "closed image": _closed,
    "image that fails": _Failing,
    "image without pixels": lambda: Image.new("RGB", (0, 8)),
    "image of floats": lambda: Image.new("F", (8, 8)),
    "meta tensor": lambda: torch.empty(3, 8, 8, dtype=torch.uint8, device="meta"),
    "sparse tensor": lambda: torch.ones(3, 8, 8, dtype=torch.uint8).to_sparse(),
    "giant view": lambda: torch.ones(1, 1, 1, dtype=torch.uint8).expand(3, 10**6, 10**6),
    "giant view of numpy": lambda: np.broadcast_to(np.uint8(1), (10**6, 10**6, 3)),
    "copy of a giant view": lambda: snapshot(np.broadcast_to(np.uint8(1), (10**6, 10**6, 3))),
    "array of objects": lambda: np.full((8, 8, 3), None),
    "array without dimensions": lambda: np.uint8(3) + np.zeros((), np.uint8),
    "nothing": lambda: None,
    "number": lambda: 3,
}
"""What is no image, or cannot be one."""
