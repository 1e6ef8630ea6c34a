"""Byte ranges over HTTP: read one, or put many into a file so that an interrupted download goes on later."""

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

CHUNK_BYTES = 16 << 20  # long against a request's latency, short against a retry's cost
THREADS = 8
RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
_PIECE_BYTES = 64 << 10  # what a broken connection costs at most
_TIMEOUT_S = 30.0  # for each connect and read, not for the whole
_BUSY = (408, 429, 500, 502, 503, 504)
# What a session raises: requests' errors are OSErrors; httpx and httpx2 have an HTTPError above all theirs.
# huggingface_hub derives its own error from the one that its session has.
TRANSPORT_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)


class TransferError(ConnectionError):
    """A transfer that kept failing after its retries."""


@dataclass(frozen=True)
class Chunk:
    """`length` bytes of `url` from byte `source`, which belong at byte `target` of the file."""

    url: str
    source: int
    target: int
    length: int


@contextmanager
def _get(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """Open a streamed GET: the response, whose body is not yet read, and an iterator over the body."""
    session: Any = get_session()
    # requests' Session (huggingface_hub < 1) has a flag of this name, httpx' Client a method.
    if callable(getattr(session, "stream", None)):
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S) as response:
            yield response, response.iter_bytes(_PIECE_BYTES)
    else:
        with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
            yield response, response.iter_content(_PIECE_BYTES)


class RangeReader:
    """Reads byte ranges of files under the same request headers, retrying what breaks off."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self.sizes: dict[str, int | None] = {}  # whole size in bytes of each URL read so far (None: untold)
        self.stop = threading.Event()  # once set, every stream ends with TransferError

    def stream(self, url: str, first: int, length: int) -> Iterator[bytes]:
        """Yield the `length` bytes of `url` from byte `first` on; fewer only where the file ends.

        Raises TransferError if the connection keeps breaking, ValueError if the server cannot send ranges,
        and huggingface_hub's errors for 401, 403, 404, ...
        """
        position, end = first, first + length
        broke: BaseException | None = None
        for wait in (0.0, *RETRY_WAITS_S):
            if self.stop.wait(wait):
                break
            try:
                with _get(url, {**self._headers, "Range": f"bytes={position}-{end - 1}"}) as (response, body):
                    size = self.sizes[url] = _whole_size(response, url, position)
                    end = end if size is None else min(end, size)
                    while position < end and (piece := next(body, b"")[: end - position]):
                        if self.stop.is_set():
                            break
                        position += len(piece)
                        yield piece
                    if position >= end:
                        next(body, b"")  # a body read to its end lets the connection be used again
            except TRANSPORT_ERRORS as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in _BUSY:
                    raise
                broke = error
            if position >= end:
                return
        reason = broke or ("stopped" if self.stop.is_set() else "the connection closed early")
        raise TransferError(f"{url}: bytes {position} to {end} did not come: {reason}") from broke


def _whole_size(response: Any, url: str, first: int) -> int | None:
    """Return the whole file's size (None: untold) from a ranged response; raises before reading its body."""
    if response.status_code >= 400:
        # httpx: the body of a streamed response must be read before its error can be described.
        _ = response.read() if hasattr(response, "read") else response.content
        hf_raise_for_status(response)
    content_range = response.headers.get("Content-Range", "")
    begin, _, total = content_range.removeprefix("bytes ").partition("/")
    if response.status_code != 206 or begin.partition("-")[0] != str(first):
        raise ValueError(
            f"{url}: expected a part of the file from byte {first} on, got status {response.status_code} and "
            f"Content-Range {content_range!r}: this server, or a proxy before it, cannot send parts; fetch "
            "the whole checkpoint with `hf download` and give its directory instead"
        )
    return int(total) if total.isdigit() else None


def cut(run: Chunk) -> Iterator[Chunk]:
    """Yield one long contiguous range as chunks of at most CHUNK_BYTES."""
    for done in range(0, run.length, CHUNK_BYTES):
        yield Chunk(run.url, run.source + done, run.target + done, min(CHUNK_BYTES, run.length - done))


def download(reader: RangeReader, chunks: Sequence[Chunk], head: bytes, file: Path, description: str) -> None:
    """Fill `file` with `head` and then the chunks, going on where an earlier call of this plan broke off.

    Beside it lies `<file>.journal` (plan, then one line for each chunk that is safely on disk), which whoever
    moves the finished file away removes. Only one process at a time may do this.
    Raises as `RangeReader.stream` does, and OSError if the disk is full.
    """
    plan = hashlib.sha256(repr((head, *chunks)).encode()).hexdigest()
    journal = journal_of(file)
    done = _finished(journal, plan) if file.exists() else set()
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
                    f"{chunk.url}: truncated: expected {chunk.length} bytes at {chunk.source}, got {written}"
                )
            # The journal must never know of bytes that a power cut could still lose.
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
            # After an error or Ctrl-C the others end at their next piece; the journal has what they finished.
            reader.stop.set()
            pool.shutdown(cancel_futures=True)


def journal_of(file: Path) -> Path:
    """Return where `download` notes which chunks of `file` are on disk."""
    return file.with_name(f"{file.name}.journal")


def _finished(journal: Path, plan: str) -> set[int]:
    """Return the chunks that `journal` lists for this plan; none if it is of another one."""
    if not journal.exists():
        return set()
    # A last line without its end is one whose writing was interrupted.
    lines = journal.read_text().split("\n")[:-1]
    return {int(line) for line in lines[1:] if line.isdigit()} if lines[:1] == [plan] else set()
