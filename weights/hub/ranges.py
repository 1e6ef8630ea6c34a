"""Byte ranges of remote files, downloaded into one file by several threads, resumably."""

import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub.utils import tqdm

from qwenvit.weights.hub.reader import HubReader

CHUNK_BYTES = 16 << 20  # large enough to hide a request's latency, small enough to make a retry cheap
THREADS = 8
_READ_BYTES = 1 << 20
_JOURNAL_LINE = re.compile(r"(\d{1,9}) ([0-9a-f]{64})")


@dataclass(frozen=True)
class Chunk:
    """A byte range to download: `length` bytes, from byte `source` of `url` to byte `target` of the file."""

    url: str
    source: int
    target: int
    length: int


def split(chunk: Chunk) -> Iterator[Chunk]:
    """Yield `chunk` in parts of at most CHUNK_BYTES."""
    for offset in range(0, chunk.length, CHUNK_BYTES):
        length = min(CHUNK_BYTES, chunk.length - offset)
        yield Chunk(chunk.url, chunk.source + offset, chunk.target + offset, length)


def download(reader: HubReader, ranges: Sequence[Chunk], head: bytes, file: Path, description: str) -> None:
    """Write `head` and then the ranges to `file`, and resume an interrupted call with equal arguments.

    `<file>.journal` records a hash of the arguments and of the versions of the remote files that `reader` has seen,
    then the index and SHA-256 of each chunk that is safely on disk. A chunk counts as done only if the file's bytes
    still have that hash. The caller removes the journal after moving the finished file. Only one process at a time may
    write to a file.

    Raises TransferError if every retry fails, ValueError if a file is truncated, changes or the server cannot send
    ranges, StatusError for 401, 403, 404, ..., and OSError if the disk is full: if it has too little space, before
    anything is written.
    """
    total = sum(part.length for part in ranges)
    # Before the ranges are split: a lying header may ask for more chunks than fit into memory.
    check_space(file, len(head) + total)
    chunks = [chunk for part in ranges for chunk in split(part)]
    versions = [(url, str(reader.versions.get(url))) for url in sorted({part.url for part in ranges})]
    plan = hashlib.sha256(repr((head, *chunks, *versions)).encode()).hexdigest()
    journal = journal_path(file)
    done = _finished_chunks(journal, file, plan, chunks)
    with file.open("r+b" if done else "wb") as stream:
        stream.truncate(len(head) + total)
        stream.write(head)
        stream.flush()
        os.fsync(stream.fileno())
    journal.write_text(f"{plan}\n" + "".join(f"{index} {digest}\n" for index, digest in sorted(done.items())))
    lock, stop = threading.Lock(), threading.Event()

    def fetch(index: int) -> None:
        chunk, written, digest = chunks[index], 0, hashlib.sha256()
        with file.open("r+b") as stream:
            stream.seek(chunk.target)
            for piece in reader.stream(chunk.url, chunk.source, chunk.length, stop):
                stream.write(piece)
                digest.update(piece)
                written += len(piece)
                with lock:
                    bar.update(len(piece))
            if written != chunk.length:
                raise ValueError(
                    f"{chunk.url}: truncated: expected {chunk.length} bytes at byte {chunk.source}, got {written}"
                )
            # Sync before the journal records the chunk, or a power cut could lose bytes that the journal lists.
            stream.flush()
            os.fsync(stream.fileno())
        with lock, journal.open("a") as lines:
            lines.write(f"{index} {digest.hexdigest()}\n")

    resumed = sum(chunks[index].length for index in done)
    with (
        tqdm(total=total, initial=resumed, unit="B", unit_scale=True, desc=description) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        futures = [pool.submit(fetch, index) for index in range(len(chunks)) if index not in done]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            # After an error or Ctrl-C the other threads stop at their next read; the journal lists finished chunks.
            stop.set()
            pool.shutdown(cancel_futures=True)


def journal_path(file: Path) -> Path:
    """Return the file in which `download` records which chunks of `file` are on disk."""
    return file.with_name(f"{file.name}.journal")


def check_space(file: Path, nbytes: int) -> None:
    """Raise OSError if the disk of `file` has too little space for it to have `nbytes` bytes.

    Blocks that a part of the file already takes count as free. The file's folder must exist.
    """
    # A file that `truncate` has made longer takes fewer blocks than its size says. Windows does not tell the blocks.
    taken = getattr(file.stat(), "st_blocks", 0) * 512 if file.exists() else 0
    disk = shutil.disk_usage(file.parent)
    # Some network drives tell nothing, and all sizes are 0.
    if disk.total and nbytes > disk.free + taken:
        needs = f"needs {nbytes - taken:,} bytes more, but its disk has only {disk.free:,} free"
        raise OSError(errno.ENOSPC, needs, str(file))


def hash_range(stream: BinaryIO, first: int, length: int, digest: "hashlib._Hash") -> None:
    """Update `digest` by `length` bytes of `stream` from byte `first` on, or fewer if the stream ends before that."""
    stream.seek(first)
    while length > 0 and (piece := stream.read(min(_READ_BYTES, length))):
        digest.update(piece)
        length -= len(piece)


def _finished_chunks(journal: Path, file: Path, plan: str, chunks: Sequence[Chunk]) -> dict[int, str]:
    """Return the hash of each chunk that `journal` lists for this plan and that `file` still contains, by index."""
    if not (journal.exists() and file.exists()):
        return {}
    lines = journal.read_text("utf-8", "replace").splitlines()
    if lines[:1] != [plan]:
        return {}
    listed = {int(match[1]): match[2] for line in lines[1:] if (match := _JOURNAL_LINE.fullmatch(line))}
    done = {}
    with file.open("rb") as stream:
        for index, expected in listed.items():
            if index < len(chunks):
                digest = hashlib.sha256()
                hash_range(stream, chunks[index].target, chunks[index].length, digest)
                if digest.hexdigest() == expected:
                    done[index] = expected
    return done
