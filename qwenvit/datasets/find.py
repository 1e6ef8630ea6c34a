"""Whatever a user names → the records of a job: files, folders, patterns, lists, archives, tables and videos."""

import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Literal

from qwenvit.datasets import archives, tables
from qwenvit.datasets.digests import DigestSet
from qwenvit.datasets.files import Folder, expand, is_pattern, walk
from qwenvit.datasets.record import Record, Unusable, WholeFile, make_record, reason_of, stamp_of, unicode_name
from qwenvit.preprocess.image_file import SUFFIXES as IMAGE_SUFFIXES

STANDARD_INPUT = "-"
VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv", ".3gp"}
)
Kind = Literal["image", "video", "archive", "table", "unusable", "shard", "other"]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A file that the inputs lead to."""

    name: str
    path: str
    named: bool
    """Whether the user named the file itself, so that it is taken whatever its suffix."""
    error: str | None = None


def find_records(
    inputs: Iterable[str | os.PathLike[str]],
    *,
    video: bool = False,
    verify: bool = False,
    image_column: str | None = None,
    exclude: str | os.PathLike[str] | None = None,
) -> "Records":
    """Look through the inputs of a job, and return an iterable of its records.

    Args:
        inputs: image files; folders, which are searched recursively for images, archives and tables; patterns with
            `*`, `?`, `[…]` and `**`; tar archives; parquet files; `"-"` for a list of such paths on standard input, one
            a line, or separated by null bytes.
        video: also take video files.
        verify: make each record's stamp from the hash of its content, which is read for it.
        image_column: the column of parquet files, where they have several. A column of paths must be named.
        exclude: a folder not to search: the output, which may be inside the input.

    Returns:
        The records, each with an id of its own: a file's name, or its path from the folder or pattern that led to it,
        or as it is in the list; `archive.tar/member`; `table.parquet/row`.

    Raises:
        ValueError: no inputs; a folder, pattern or list without images; two inputs of the same id; a parquet file
            without a column of images or with several; a video without `video`; `exclude` is an input.
        OSError: an input does not exist.
        ImportError: a parquet file, and pyarrow is not installed.
    """
    return Records([os.fspath(one) for one in inputs], video, verify, image_column, exclude)


class Records:
    """The records of a job. May be iterated again, in the same order; nothing is opened before its turn."""

    def __init__(
        self,
        inputs: list[str],
        video: bool,
        verify: bool,
        image_column: str | None,
        exclude: str | os.PathLike[str] | None,
    ) -> None:
        if not inputs:
            raise ValueError("inputs: expected at least one, got none")
        self._inputs = [one if one == STANDARD_INPUT else os.path.expanduser(one) for one in inputs]
        self._video, self._verify, self._image_column, self._exclude = video, verify, image_column, exclude
        self._list = _spool(sys.stdin.buffer) if STANDARD_INPUT in inputs else None
        self._count = self._archive_bytes = 0
        self._from_archives = self._archive_bytes_read = 0
        self._survey()

    @property
    def has_archives(self) -> bool:
        """Whether there are archives, so that the number of records is an estimate."""
        return self._archive_bytes > 0

    @property
    def expected(self) -> int | None:
        """The number of records: exact without archives, else estimated from what has been read of them."""
        if not self._archive_bytes:
            return self._count
        if not self._archive_bytes_read:
            return None
        scale = max(self._archive_bytes / self._archive_bytes_read, 1)
        return self._count + round(self._from_archives * scale)

    def __iter__(self) -> Iterator[Record]:
        self._from_archives = archive_bytes_before = self._archive_bytes_read = 0
        for one in self._inputs:
            for candidate in self._candidates(one):
                kind = self._kind(candidate)
                if kind == "archive":
                    videos = VIDEO_SUFFIXES if self._video else frozenset()
                    size = _size(candidate.path)
                    for record in archives.read_archive(candidate.path, candidate.name, videos, self._verify):
                        self._from_archives += 1
                        inside = getattr(record.content, "start", 0)
                        self._archive_bytes_read = archive_bytes_before + inside
                        yield record
                    archive_bytes_before += size
                    self._archive_bytes_read = archive_bytes_before
                elif kind == "table":
                    yield from tables.read_table(candidate.path, candidate.name, self._image_column, self._verify)
                elif kind not in ("shard", "other"):
                    yield self._file(candidate, kind)

    def _file(self, candidate: _Candidate, kind: Kind) -> Record:
        error, stamp = candidate.error, "unreadable"
        if kind == "unusable" and error is None:
            error = "a video: pass video=True (--video) to encode it"
        if error is None:
            try:
                stamp = stamp_of(candidate.path)
            except (OSError, ValueError) as raised:
                error = reason_of(raised)
        content = WholeFile(candidate.path) if error is None else Unusable(error)
        is_video = kind == "video"
        return make_record(candidate.name, candidate.path, stamp, content, verify=self._verify, is_video=is_video)

    def _survey(self) -> None:
        """Count the records and check their ids, without reading archives or the contents of files."""
        names = DigestSet()
        for one in self._inputs:
            found = skipped = shards = 0
            for candidate in self._candidates(one):
                kind = self._kind(candidate)
                if kind == "shard":
                    shards += 1
                    continue
                if kind == "other":
                    skipped += not os.path.basename(candidate.path).startswith("._")
                    continue
                found += 1
                if not names.add(unicode_name(candidate.name)):
                    raise ValueError(f"inputs of the same name would overwrite each other: {candidate.name}")
                if kind == "unusable" and one != STANDARD_INPUT and candidate.error is None:
                    raise ValueError(f"{candidate.path}: a video; pass video=True (--video) to encode it")
                if kind == "archive":
                    self._archive_bytes += _size(candidate.path)
                elif kind == "table":
                    self._count += self._rows(candidate)
                else:
                    self._count += 1
            place = "standard input" if one == STANDARD_INPUT else one
            if not found:
                is_list, is_folder = one == STANDARD_INPUT, os.path.isdir(one)
                where = "in this list" if is_list else "in this folder" if is_folder else "match this pattern"
                raise ValueError(f"{place}: no images {where} ({', '.join(sorted(IMAGE_SUFFIXES))})")
            if shards:
                warnings.warn(f"{place}: {shards} shards of embeddings that qwenvit wrote skipped", stacklevel=4)
            if skipped:
                warnings.warn(f"{place}: {skipped} other files skipped", stacklevel=4)

    def _candidates(self, one: str) -> Iterator[_Candidate]:
        """Yield the files that an input leads to, in order."""
        exclude = None
        if self._exclude is not None:
            with suppress(OSError):
                status = os.stat(self._exclude)
                exclude = status.st_dev, status.st_ino
        if one == STANDARD_INPUT:
            for line in _lines(self._list) if self._list is not None else ():
                name = line.removeprefix("./")
                if os.path.isdir(line):
                    yield from self._walk(line, name.rstrip("/") + "/", exclude)
                else:
                    error = None if os.path.exists(line) else "no such file or folder"
                    yield _Candidate(name, line, True, error)
        elif os.path.isdir(one):
            yield from self._walk(one, "", exclude)
        elif os.path.exists(one):
            yield _Candidate(os.path.basename(one), one, True)
        elif is_pattern(one):
            for found in expand(one, exclude):
                yield _Candidate(found.relative, found.path, False, found.error)
        else:
            raise FileNotFoundError(f"{one}: no such file or folder")

    def _walk(self, folder: str, prefix: str, exclude: Folder | None) -> Iterator[_Candidate]:
        status = os.stat(folder)
        if exclude == (status.st_dev, status.st_ino):
            raise ValueError(f"output: expected another folder than the input {folder}")
        for found in walk(folder, exclude):
            yield _Candidate(prefix + found.relative, found.path, False, found.error)

    def _kind(self, candidate: _Candidate) -> Kind:
        base = os.path.basename(candidate.path).lower()
        suffix = os.path.splitext(base)[1]
        if candidate.error is not None:
            return "unusable"
        if base.startswith("._") and not candidate.named:  # macOS writes such files on disks of other file systems
            return "other"
        if base.endswith(archives.SUFFIXES):
            return "archive"
        if suffix == tables.SUFFIX:
            return "table" if candidate.named else self._kind_of_table(candidate.path)
        if suffix in VIDEO_SUFFIXES:
            return "video" if self._video else "unusable" if candidate.named else "other"
        return "image" if candidate.named or suffix in IMAGE_SUFFIXES else "other"

    def _kind_of_table(self, table: str) -> Kind:
        try:
            if tables.is_shard(table):
                return "shard"
            return "table" if tables.count_rows(table, self._image_column) is not None else "other"
        except tables.ColumnError:
            raise
        except (OSError, ValueError):
            return "table"  # a broken table is a failure, not another kind of file

    def _rows(self, candidate: _Candidate) -> int:
        try:
            rows = tables.count_rows(candidate.path, self._image_column)
        except tables.ColumnError:
            raise
        except (OSError, ValueError):
            return 1  # the record that says so
        if rows is None:
            raise tables.ColumnError(
                f"{candidate.path}: no column of encoded images in this table; name a column of paths with image_column"
            )
        return rows


def _size(file: str) -> int:
    with suppress(OSError):
        return os.path.getsize(file)
    return 0


def _spool(stream: BinaryIO) -> BinaryIO:
    """Copy a list to a temporary file, because it is read twice and may be long."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 closed with the records
    while block := stream.read(2**16):
        spool.write(block)
    return spool


def _lines(spool: BinaryIO) -> Iterator[str]:
    """Yield the paths of a list, separated by null bytes if there is one in its first line, else by newlines."""
    spool.seek(0)
    separator = b"\0" if b"\0" in spool.read(2**16) else b"\n"
    position, rest = 0, b""
    while True:
        spool.seek(position)
        block = spool.read(2**16)
        position += len(block)
        *lines, rest = (rest + block).split(separator) if block else (rest, b"")
        for line in lines:
            path = line.removesuffix(b"\r") if separator == b"\n" else line
            if path:
                yield os.fsdecode(path)
        if not block:
            return
