"""Files that appear whole or not at all, and stay after a power failure."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from qwenvit.weights.save import sync_folder

PARTIAL = ".partial"
"""What the name of a file ends with until it is whole."""


def partial_path(path: Path) -> Path:
    """Return the name under which a file is written before it is whole."""
    return path.with_name(path.name + PARTIAL)


def publish(path: Path) -> None:
    """Give the whole and synced partial file its name, and bring the name to the disk."""
    os.replace(partial_path(path), path)
    sync_folder(path.parent)


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Write a text file in UTF-8; on any failure `path` is what it was.

    Raises:
        OSError: the file cannot be written.
    """
    partial = partial_path(path)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
        publish(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(error.errno, error.strerror, str(path)) from error  # not the temporary name
        raise
