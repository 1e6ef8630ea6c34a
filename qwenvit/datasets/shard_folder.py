"""The folder that a job writes: which rows it has, and how another shard gets into it.

A shard is `NNNNN.parquet` (or another suffix) with `NNNNN.index.jsonl`, a line for each row. Both are written under
names that end in `.partial`, then get their own, the index first. So a shard is whole exactly if both are there.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qwenvit.datasets import failures, manifest
from qwenvit.datasets.atomic import PARTIAL, partial_path, publish
from qwenvit.datasets.digests import digest_of
from qwenvit.datasets.formats import SUFFIXES
from qwenvit.weights.save import sync_folder

INDEX_SUFFIX = ".index.jsonl"
_NUMBERED = re.compile(r"(\d{5,})(\.[a-z.]+)")


@dataclass(frozen=True)
class ShardReport:
    """A whole shard."""

    images: int
    tokens: int
    bytes: int


class DoneItems:
    """The ids and contents of all rows of a folder, in 16 bytes each."""

    def __init__(self, ids: "array[int]", contents: "array[int]") -> None:
        """Take the digests of the ids, and those of the ids with the stamps."""
        self._ids = np.sort(np.frombuffer(ids, np.uint64))
        self._contents = np.sort(np.frombuffer(contents, np.uint64))

    def has(self, identifier: str, stamp: str) -> bool:
        """Return whether there is a row of this id and content."""
        return _is_in(self._contents, _content(identifier, stamp))

    def has_id(self, identifier: str) -> bool:
        """Return whether there is a row of this id."""
        return _is_in(self._ids, digest_of(identifier))

    @property
    def may_repeat(self) -> bool:
        """Whether two rows may have the same id."""
        return bool((self._ids[1:] == self._ids[:-1]).any())


def _content(identifier: str, stamp: str) -> int:
    return digest_of(f"{identifier}\0{stamp}")


def _is_in(digests: NDArray[np.uint64], digest: int) -> bool:
    position = int(digests.searchsorted(np.uint64(digest)))
    return position < len(digests) and int(digests[position]) == digest


def files_of_shards(folder: Path) -> Iterator[Path]:
    """Yield the folder's shards, indexes and partial files, in the order of their names."""
    suffixes = {INDEX_SUFFIX, *SUFFIXES.values()}
    for path in sorted(folder.iterdir()):
        match = _NUMBERED.fullmatch(path.name.removesuffix(PARTIAL))
        if match and match[2] in suffixes:
            yield path


def next_number(folder: Path) -> int:
    """Return a number above those of all shards, whole or not."""
    return 1 + max((int(path.name.partition(".")[0]) for path in files_of_shards(folder)), default=-1)


def drop_unfinished(folder: Path, suffix: str) -> None:
    """Remove partial files, and indexes whose shard was never finished.

    Raises:
        ValueError: a shard without its index, which no death of a job leaves behind.
        OSError: a file cannot be removed.
    """
    for name in (manifest.NAME, failures.NAME):
        partial_path(folder / name).unlink(missing_ok=True)
    for path in files_of_shards(folder):
        stem = path.name.partition(".")[0]
        if path.name.endswith(PARTIAL):
            path.unlink()
        elif path.name.endswith(INDEX_SUFFIX):
            if not (folder / f"{stem}{suffix}").exists():
                path.unlink()
        elif not (folder / f"{stem}{INDEX_SUFFIX}").exists():
            raise ValueError(f"{path}: expected {stem}{INDEX_SUFFIX} beside it; remove the shard to encode it again")
    sync_folder(folder)


def remove_all(folder: Path) -> None:
    """Remove the rows of an earlier job; a shard before its index, so that this may be interrupted."""
    for path in sorted(files_of_shards(folder), key=lambda path: path.name.endswith(INDEX_SUFFIX)):
        path.unlink()
    (folder / failures.NAME).unlink(missing_ok=True)
    sync_folder(folder)


def read_done(folder: Path, suffix: str) -> tuple[DoneItems, dict[str, int]]:
    """Return what is done, and the manifest's counts of it.

    Raises:
        ValueError: an index that is damaged, or an id that has two rows.
        OSError: an index cannot be read.
    """
    ids, contents = array("Q"), array("Q")
    tokens = shards = size = 0
    for index in _indexes(folder):
        for _, identifier, stamp, more_tokens in _rows(index):
            ids.append(digest_of(identifier))
            contents.append(_content(identifier, stamp))
            tokens += more_tokens
        shards += 1
        size += index.with_name(index.name.removesuffix(INDEX_SUFFIX) + suffix).stat().st_size
    done = DoneItems(ids, contents)
    if done.may_repeat:
        _refuse_repeated(folder)
    counts = {"images": len(ids), "failed": 0, "tokens": tokens, "shards": shards, "bytes": size}
    return done, counts


def _indexes(folder: Path) -> Iterator[Path]:
    return (path for path in files_of_shards(folder) if path.name.endswith(INDEX_SUFFIX))


def _rows(index: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield number, id, stamp and tokens of each line of an index."""
    with index.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield number, str(row["id"]), str(row["stamp"]), int(row["tokens"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index}: line {number}: expected a row of a job's index ({error!r})") from error


def _refuse_repeated(folder: Path) -> None:
    """Raise ValueError for an id that has two rows; to find it takes more memory."""
    seen: set[str] = set()
    for index in _indexes(folder):
        for number, identifier, *_ in _rows(index):
            if identifier in seen:
                told = f"expected one row for an id, got a second for {identifier!a}"
                raise ValueError(f"{index}: line {number}: {told}")
            seen.add(identifier)


class ShardFile:
    """A shard that is being written: its own partial file, `stream`, and that of its index.

    Its `number` is the first from `first` on that is free.

    A number is taken by creating the partial index exclusively, so processes need no counter that a dead one could
    keep locked.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, folder: Path, suffix: str, first: int) -> None:
        self.number = first - 1
        while True:
            self.number += 1
            self._index = folder / f"{self.number:05d}{INDEX_SUFFIX}"
            self._shard = folder / f"{self.number:05d}{suffix}"
            if self._index.exists() or self._shard.exists():
                continue
            with suppress(FileExistsError):
                lines = partial_path(self._index).open("x", encoding="utf-8", newline="\n")
                if not self._index.exists():  # else another process has just finished it
                    break
                lines.close()
                partial_path(self._index).unlink()
        self._lines = lines
        self._images = self._tokens = 0
        try:
            self.stream: BinaryIO = partial_path(self._shard).open("w+b")
        except BaseException:
            self._lines.close()
            partial_path(self._index).unlink(missing_ok=True)
            raise

    @property
    def images(self) -> int:
        """The rows so far."""
        return self._images

    def add_to_index(self, identifier: str, stamp: str, grid: tuple[int, int, int], tokens: int) -> None:
        """Note a row that is in the shard."""
        row: dict[str, Any] = {"id": identifier, "stamp": stamp, "grid": grid, "tokens": tokens}
        self._lines.write(json.dumps(row) + "\n")
        self._images += 1
        self._tokens += tokens

    def finish(self) -> ShardReport:
        """Bring both files to the disk and give them their names: from now on the shard is there.

        Raises:
            OSError: a file cannot be written.
        """
        for stream in (self._lines, self.stream):
            stream.flush()
            os.fsync(stream.fileno())
        size = os.fstat(self.stream.fileno()).st_size
        self._lines.close()
        self.stream.close()
        publish(self._index)
        publish(self._shard)
        return ShardReport(self._images, self._tokens, size)

    def abandon(self) -> None:
        """Remove both files."""
        for stream, path in ((self.stream, self._shard), (self._lines, self._index)):
            with suppress(OSError, ValueError):
                stream.close()  # writes what is buffered, for which there may be no space
            with suppress(OSError):
                partial_path(path).unlink(missing_ok=True)
