"""One input of a job: an image or a video, what names it, and how its content is opened."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from qwenvit.weights.regular_file import open_regular

MAX_MEMBER_BYTES = 256 * 2**20
"""The largest member of an archive that is read: members are read whole, several at a time."""


@dataclass(frozen=True, slots=True)
class WholeFile:
    """A file."""

    file: str

    def open(self) -> Path:
        """Return the file's path: whoever decodes it reads as much as is needed."""
        return Path(self.file)

    def sha256(self) -> str:
        """Return the hash of the file."""
        with open_regular(Path(self.file)) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class FilePart:
    """Consecutive bytes of a file: a member of an archive that is not compressed."""

    file: str
    start: int
    size: int

    def open(self) -> bytes:
        """Return the bytes.

        Raises:
            ValueError: the file ends before them, or they are too many.
        """
        if self.size > MAX_MEMBER_BYTES:
            raise ValueError(f"expected a member of at most {MAX_MEMBER_BYTES} bytes, got {self.size}")
        with open_regular(Path(self.file)) as stream:
            stream.seek(self.start)
            data = stream.read(self.size)
        if len(data) < self.size:
            raise ValueError(f"the archive is cut short: {len(data)} of the member's {self.size} bytes are there")
        return data

    def sha256(self) -> str:
        """Return the hash of the bytes."""
        return hashlib.sha256(self.open()).hexdigest()


@dataclass(frozen=True, slots=True)
class Bytes:
    """An encoded image in memory: a cell of a table, or a member of a compressed archive."""

    data: bytes

    def open(self) -> bytes:
        """Return the bytes."""
        return self.data

    def sha256(self) -> str:
        """Return the hash of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class Unusable:
    """Something that was found and cannot be opened, so that it fails like a broken image and is not lost silently."""

    reason: str

    def open(self) -> bytes:
        """Raise ValueError with the reason."""
        raise ValueError(self.reason)

    def sha256(self) -> str:
        """Raise ValueError with the reason."""
        raise ValueError(self.reason)


Content = WholeFile | FilePart | Bytes | Unusable


@dataclass(frozen=True, slots=True)
class Record:
    """One input of a job. Small unless its content is `Bytes`, and can be pickled."""

    id: str
    """Unique among the inputs and the same in every run. Valid Unicode, but any character may occur."""
    stamp: str
    """Differs when the content has changed: size and time of change, or with `verify` the hash of the content."""
    path: str
    """Where it was found: a file, or a file and the member or row in it. Valid Unicode."""
    content: Content
    is_video: bool = False

    def open(self) -> bytes | Path:
        """Return the encoded image, or the path of a file.

        Raises:
            ValueError: the input cannot be used; the message says why.
            OSError: a file cannot be read.
        """
        return self.content.open()


def make_record(
    name: str, path: str, file_stamp: str, content: Content, *, verify: bool, is_video: bool = False
) -> Record:
    """Return the record of a content; names that are not valid Unicode get backslash escapes.

    Args:
        name: the id.
        path: where it was found.
        file_stamp: the stamp without `verify`.
        content: what is in it.
        verify: make the stamp from the content's hash. What cannot be read is `Unusable`.
        is_video: whether it is a video.
    """
    if verify and not isinstance(content, Unusable):
        try:
            file_stamp = f"sha256:{content.sha256()}"
        except (OSError, ValueError) as error:
            file_stamp, content = "unreadable", Unusable(reason_of(error))
    return Record(unicode_name(name), file_stamp, unicode_name(path), content, is_video)


def unicode_name(name: str) -> str:
    r"""Return a file's name as valid Unicode: bytes that are no UTF-8, kept as surrogates, become escapes like \xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def stamp_of(file: str) -> str:
    """Return a file's size and time of change.

    Raises:
        OSError: there is no such file, or its folder cannot be read.
    """
    found = os.stat(file)
    return f"{found.st_size}-{found.st_mtime_ns}"


def reason_of(error: Exception) -> str:
    """Return what went wrong, without the path that an error of the system repeats."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
