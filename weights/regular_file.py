"""Opening a file that may turn out to be something else."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises OSError if it cannot be opened, and ValueError for anything else: a named pipe blocks until someone writes
    to it, and a device may have no end.
    """
    kind = _kind(file.stat().st_mode)
    if kind == "regular file":
        # What the name means may change before it is opened: ask the open file again. Without O_NONBLOCK, opening a
        # pipe would block. Windows has neither named pipes in folders nor this flag.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        kind = _kind(os.fstat(descriptor).st_mode)
        if kind == "regular file":
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise ValueError(f"{file}: expected a regular file, got a {kind}")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "file of an unknown kind")
