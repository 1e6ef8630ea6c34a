"""Reads byte ranges and small files of a Hub, and believes no answer that contradicts itself or an earlier one."""

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType

from qwenvit.weights.hub.session import TRANSPORT_ERRORS, Answer, get

RETRY_WAITS_S = (0.5, 1.0, 2.0, 4.0)
MAX_RETRY_AFTER_S = 120.0  # a server that asks for a longer wait gets no retry
PROGRESS_BYTES = 1 << 20  # a transfer that brought as much since its last failure has all its retries again
MAX_ERROR_BYTES = 4 << 10  # how much of an error's body is read
_RETRYABLE_STATUSES = (408, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_RATE_LIMIT = re.compile(r"\bt=(\d{1,9})\b")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT_HEADER = "X-Repo-Commit"


class TransferError(ConnectionError):
    """A transfer failed in every retry, or was stopped."""


class StatusError(ConnectionError):
    """An answer with an error status.

    Attributes: `status`; `code`, the Hub's name of the error ("" if it gave none); `retry_after_s`, how long the
    server asked to wait.
    """

    def __init__(self, url: str, answer: Answer) -> None:
        self.url, self.status = url, answer.status
        self.code = answer.headers.get("X-Error-Code") or ""
        # The Hub says it in a header of its own: `"api";r=0;t=55` (no request left, for 55 seconds).
        limit = _RATE_LIMIT.search(answer.headers.get("RateLimit") or "") if self.status == 429 else None
        self.retry_after_s = max(_seconds(answer.headers.get("Retry-After")), float(limit[1]) if limit else 0.0)
        # Ends at the first byte that does not come: the status says enough.
        text, body = b"", answer.body
        try:
            while len(text) < MAX_ERROR_BYTES and (piece := next(body, b"")):
                text += piece
        except TRANSPORT_ERRORS:
            pass
        said = " ".join(text[:MAX_ERROR_BYTES].decode("utf-8", "replace").split())[:200]
        super().__init__(f"{url}: status {self.status}" + f" ({said})" * bool(said and said.isprintable()))


@dataclass(frozen=True)
class Version:
    """What the first answer said of the file at a URL; None: nothing. No later answer may contradict it."""

    size: int | None  # in bytes
    etag: str | None
    sha256: str | None  # of the whole file, where the Hub sends it (`X-Linked-Etag`)

    def contradicts(self, other: "Version") -> bool:
        """Return whether the two cannot be of one file. Not every server of a network sends every header.

        Two servers may have two ETags for one file, so these count only where the hashes are not known.
        """
        pairs = [(self.size, other.size), (self.sha256, other.sha256)]
        if self.sha256 is None or other.sha256 is None:
            pairs.append((self.etag, other.etag))
        return any(own != others for own, others in pairs if own is not None and others is not None)

    def __str__(self) -> str:
        """What identifies the file, for the plan of a download that may be resumed."""
        return f"{self.size} {self.sha256 or self.etag}"


class HubReader:
    """Reads with fixed request headers, and retries when a connection breaks or the server is busy.

    `versions` are those of the URLs of which `stream` read a part. If `commit` is given, answers for another one are
    refused.
    """

    def __init__(self, headers: Mapping[str, str], commit: str | None = None) -> None:
        # Compressed bodies could expand without bound, and their ranges are not the file's.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._commit = commit
        self._lock = threading.Lock()
        self.versions: dict[str, Version] = {}

    def stream(self, url: str, first: int, length: int, stop: threading.Event | None = None) -> Iterator[bytes]:
        """Yield `length` bytes of `url` from byte `first` on, or fewer if the file ends before that.

        Raises TransferError if every retry fails or once `stop` is set, StatusError for 401, 403, 404, ..., and
        ValueError if the server cannot send ranges or the file differs from that of an earlier answer.
        """
        position, end = first, first + length
        attempts, failed_at = _Attempts(stop), first
        for attempt in attempts:
            if position - failed_at >= PROGRESS_BYTES:
                attempts.start_again()
                failed_at = position
            with attempt, get(url, {**self._headers, "Range": f"bytes={position}-{end - 1}"}, stop) as answer:
                size = self._check_part(answer, url, position)
                end = end if size is None else min(end, size)
                while position < end and (piece := next(answer.body, b"")[: end - position]):
                    position += len(piece)
                    yield piece
                if position < end:
                    raise ConnectionError("the connection closed early")
                # Reading to the end lets the session reuse the connection; a longer body is left alone.
                if answer.headers.get("Content-Range", "").startswith(f"bytes {first}-{end - 1}/"):
                    next(answer.body, b"")
            if position >= end:
                return
        raise attempts.error(f"{url}: bytes {position} to {end} did not arrive")

    def read(self, url: str, limit: int) -> bytes:
        """Return the small file, or the answer of the Hub's interface, at `url`.

        Raises ValueError if it is larger than `limit` bytes, and the errors of `stream`.
        """
        attempts = _Attempts(None)
        for attempt in attempts:
            with attempt, get(url, self._headers) as answer:
                self._check_answer(answer, url, (200,))
                data = bytearray()
                for piece in answer.body:
                    data += piece
                    if len(data) > limit:
                        raise ValueError(f"{url}: expected at most {limit} bytes, got more")
                return bytes(data)
        raise attempts.error(f"{url}: did not arrive")

    def _check_part(self, answer: Answer, url: str, first: int) -> int | None:
        """Return the file's size in bytes (None: not sent) from the answer to a range request, before its body is read.

        Raises StatusError, and ValueError if the answer is not the requested range of the known version of the file.
        """
        self._check_answer(answer, url, None)
        given = answer.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(given)
        length = answer.headers.get("Content-Length")
        promised = "" if match is None else str(int(match[2]) - int(match[1]) + 1)
        if answer.status != 206 or match is None or int(match[1]) != first or length not in (None, promised):
            raise ValueError(
                f"{url}: expected a part of the file from byte {first} on, got status {answer.status} and "
                f"Content-Range {given[:80]!r} with Content-Length {str(length)[:20]}: this server, or a proxy before "
                "it, cannot send parts; download "
                "the whole checkpoint with `hf download` and pass its directory instead"
            )
        size = None if match[3] == "*" else int(match[3])
        if size is not None and int(match[2]) >= size:
            raise ValueError(f"{url}: expected a part within the file, got Content-Range {given!r}")
        etag = answer.headers.get("ETag")
        linked = (answer.hub_headers.get("X-Linked-Etag") or "").strip('"')
        version = Version(
            size, None if etag is None else etag.removeprefix("W/"), linked if _SHA256.fullmatch(linked) else None
        )
        with self._lock:
            known = self.versions.setdefault(url, version)
        if version.contradicts(known):
            raise ValueError(
                f"{url}: the file changed on the server during the download: expected {known}, got {version}; "
                "nothing of the two is mixed: call again"
            )
        return size

    def _check_answer(self, answer: Answer, url: str, statuses: tuple[int, ...] | None) -> None:
        if answer.status >= 400:
            raise StatusError(url, answer)
        if statuses is not None and answer.status not in statuses:
            raise ValueError(f"{url}: expected status {statuses[0]}, got {answer.status}")
        encoding = answer.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise ValueError(f"{url}: expected the file's bytes, got Content-Encoding {encoding[:80]!r}")
        commit = answer.hub_headers.get(_COMMIT_HEADER)
        if self._commit is not None and commit not in (None, self._commit):
            raise ValueError(f"{url}: expected a file of commit {self._commit}, got one of {commit[:80]!r}")


class _Attempts:
    """Attempts of one transfer: each is a context that notes why it failed; between two there is a wait."""

    def __init__(self, stop: threading.Event | None) -> None:
        self._stop = stop or threading.Event()
        self._waits: Iterator[float] = iter(())
        self._failure: BaseException | None = None

    def start_again(self) -> None:
        """Count from the first attempt again."""
        self._waits = iter(RETRY_WAITS_S)

    def __iter__(self) -> Iterator["_Attempts"]:
        self._waits = iter((0.0, *RETRY_WAITS_S))
        while (wait := next(self._waits, None)) is not None:
            asked = self._failure.retry_after_s if isinstance(self._failure, StatusError) else 0.0
            if asked > MAX_RETRY_AFTER_S or self._stop.wait(max(wait, asked)):
                return
            yield self

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, TRANSPORT_ERRORS):
            return False
        if isinstance(error, StatusError) and error.status not in _RETRYABLE_STATUSES:
            return False
        self._failure = error
        return True

    def error(self, what: str) -> TransferError:
        """Return the error for a transfer of which every attempt failed."""
        failure = self._failure
        reason = "stopped" if self._stop.is_set() else str(failure) or type(failure).__name__
        if isinstance(failure, StatusError) and failure.retry_after_s > MAX_RETRY_AFTER_S:
            reason += f"; the server asks for no request in the next {failure.retry_after_s:.0f} s"
        error = TransferError(f"{what}: {reason}")
        error.__cause__ = failure
        return error


def _seconds(retry_after: str | None) -> float:
    """Return the wait that a `Retry-After` header asks for: seconds or a date; 0 for none or another text."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp())
    except (ValueError, OverflowError, TypeError):
        return 0.0
