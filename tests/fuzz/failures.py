"""Cases that fail in every way that the frame must see."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fuzz.frame import MEMORY_BYTES, Case, DifferentError

DOCUMENTED = (ValueError, OSError)


def cases(seed: int, count: int) -> Iterator[Case]:
    """Yield each way to fail, in a fixed order."""
    assert (seed, count) == (0, len(_CASES))
    for description, run in _CASES.items():
        yield Case(description, run)


def _raise(error: Exception) -> None:
    raise error


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def _recurse() -> None:
    _recurse()


def _write(folder: Path) -> None:
    assert not list(folder.iterdir())
    (folder / "file").touch()


_CASES = {
    "equal": _write,
    "value error": lambda _: _raise(ValueError("bad")),
    "no file": lambda folder: (folder / "absent").read_bytes(),
    "killed": lambda _: _signal(signal.SIGKILL),
    "bus error": lambda _: _signal(signal.SIGBUS),
    "exit": lambda _: os._exit(3),
    "hang": lambda _: time.sleep(60),
    "type error": lambda _: _raise(TypeError("bad")),
    "recursion": lambda _: _recurse(),
    "raw Unicode error": lambda _: b"\xff".decode(),
    "allocation": lambda _: bytearray(sys.maxsize),
    "different": lambda _: _raise(DifferentError("other numbers")),
    "memory": lambda _: bytearray(MEMORY_BYTES + (100 << 20)).count(1),
    "equal again": _write,
}
