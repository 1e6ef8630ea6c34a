"""Byte ranges over HTTP: streamed with retries, or downloaded into a file by several threads, resumably."""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status, tqdm

CHUNK_BYTES = 16 << 20  # large enough to hide a request's latency, small enough to make a retry cheap
THREADS = 8
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
_READ_BYTES = 64 << 10  # a broken connection loses at most this much
_TIMEOUT_S = 30.0  # of each connect and each read, not of the whole transfer
_RETRYABLE_STATUSES = (408, 429, 500, 502, 503, 504)
# Every error of huggingface_hub's session: those of requests are OSErrors, and those of httpx and httpx2 derive from an
# HTTPError of their own. HfHubHTTPError derives from the error class of the session's library.
TRANSPORT_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)


class TransferError(ConnectionError):
    """A transfer failed in every retry, or was stopped."""


@dataclass(frozen=True)
class Chunk:
    """A byte range to download: `length` bytes, from byte `source` of `url` to byte `target` of the file."""

    url: str
    source: int
    target: int
    length: int


@contextmanager
def _get(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """Open a streamed GET; yield the response, whose body is not read yet, and an iterator over the body."""
    session: Any = get_session()
    # `stream` is a method of httpx's Client and a flag of requests' Session (huggingface_hub < 1).
    if callable(getattr(session, "stream", None)):
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S) as response:
            yield response, response.iter_bytes(_READ_BYTES)
    else:
        with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
            yield response, response.iter_content(_READ_BYTES)


class RangeReader:
    """Reads byte ranges of URLs with fixed request headers, and retries when a connection breaks."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self.sizes: dict[str, int | None] = {}  # file size in bytes of each URL read so far (None: not sent)
        self.stop = threading.Event()  # once set, every stream ends with TransferError

    def stream(self, url: str, first: int, length: int) -> Iterator[bytes]:
        """Yield `length` bytes of `url` from byte `first` on, or fewer if the file ends before that.

        Raises TransferError if every retry fails, ValueError if the server cannot send ranges, and
        huggingface_hub's errors for 401, 403, 404, ...
        """
        position, end = first, first + length
        failure: BaseException | None = None
        for wait in (0.0, *RETRY_WAITS_S):
            if self.stop.wait(wait):
                break
            try:
                with _get(url, {**self._headers, "Range": f"bytes={position}-{end - 1}"}) as (response, body):
                    size = self.sizes[url] = _file_size(response, url, position)
                    end = end if size is None else min(end, size)
                    while position < end and (piece := next(body, b"")[: end - position]):
                        if self.stop.is_set():
                            break
                        position += len(piece)
                        yield piece
                    if position >= end:
                        next(body, b"")  # reading to the end lets the session reuse the connection
            except TRANSPORT_ERRORS as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in _RETRYABLE_STATUSES:
                    raise
                failure = error
            if position >= end:
                return
        reason = failure or ("stopped" if self.stop.is_set() else "the connection closed early")
        raise TransferError(f"{url}: bytes {position} to {end} did not arrive: {reason}") from failure


def _file_size(response: Any, url: str, first: int) -> int | None:
    """Return the file's size in bytes (None: not sent) from the response to a range request.

    Raises huggingface_hub's error for an error status, and ValueError, before the body is read, if the response is
    not the requested range.
    """
    if response.status_code >= 400:
        # httpx describes the error of a streamed response only after its body was read.
        _ = response.read() if hasattr(response, "read") else response.content
        hf_raise_for_status(response)
    content_range = response.headers.get("Content-Range", "")
    begin, _, total = content_range.removeprefix("bytes ").partition("/")
    if response.status_code != 206 or begin.partition("-")[0] != str(first):
        raise ValueError(
            f"{url}: expected a part of the file from byte {first} on, got status {response.status_code} and "
            f"Content-Range {content_range!r}: this server, or a proxy before it, cannot send parts; download "
            "the whole checkpoint with `hf download` and pass its directory instead"
        )
    return int(total) if total.isdigit() else None


def split(chunk: Chunk) -> Iterator[Chunk]:
    """Yield `chunk` in parts of at most CHUNK_BYTES."""
    for offset in range(0, chunk.length, CHUNK_BYTES):
        length = min(CHUNK_BYTES, chunk.length - offset)
        yield Chunk(chunk.url, chunk.source + offset, chunk.target + offset, length)


def download(reader: RangeReader, chunks: Sequence[Chunk], head: bytes, file: Path, description: str) -> None:
    """Write `head` and then the chunks to `file`, and resume an interrupted call with equal arguments.

    `<file>.journal` records a hash of the arguments, then the index of each chunk that is safely on disk. The caller
    removes it after moving the finished file. Only one process at a time may write to a file.

    Raises TransferError if every retry fails, ValueError if a file is truncated or the server cannot send ranges,
    huggingface_hub's errors for 401, 403, 404, ..., and OSError if the disk is full.
    """
    plan = hashlib.sha256(repr((head, *chunks)).encode()).hexdigest()
    journal = journal_path(file)
    done = _finished_chunks(journal, plan) if file.exists() else set()
    with file.open("r+b" if done else "wb") as stream:
        stream.truncate(len(head) + sum(chunk.length for chunk in chunks))
        stream.write(head)
        stream.flush()
        os.fsync(stream.fileno())
    journal.write_text("".join(f"{line}\n" for line in (plan, *sorted(done))))
    lock = threading.Lock()

    def fetch(index: int) -> None:
        chunk, written = chunks[index], 0
        with file.open("r+b") as stream:
            stream.seek(chunk.target)
            for piece in reader.stream(chunk.url, chunk.source, chunk.length):
                stream.write(piece)
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
            lines.write(f"{index}\n")

    total, resumed = sum(chunk.length for chunk in chunks), sum(chunks[index].length for index in done)
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
            reader.stop.set()
            pool.shutdown(cancel_futures=True)


def journal_path(file: Path) -> Path:
    """Return the file in which `download` records which chunks of `file` are on disk."""
    return file.with_name(f"{file.name}.journal")


def _finished_chunks(journal: Path, plan: str) -> set[int]:
    """Return the chunk indices that `journal` lists for this plan; none if it belongs to another plan."""
    if not journal.exists():
        return set()
    # Drop a last line without a newline: its writing was interrupted.
    lines = journal.read_text().split("\n")[:-1]
    return {int(line) for line in lines[1:] if line.isdigit()} if lines[:1] == [plan] else set()
