"""One GET through huggingface_hub's session, bounded in time whatever the server does.

The session is httpx's, or that of requests (huggingface_hub < 1); both follow proxies and certificates as the user set
them up for huggingface_hub.
"""

import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookiejar import Cookie, DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin, urlsplit

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

# A server that sends less than this in this time is as good as silent. The Hub sends a thousand times as much.
SLOWEST_BYTES_PER_S = 1 << 10
SPEED_WINDOW_S = 30.0
MAX_REDIRECTS = 10
_CONNECT_TIMEOUT_S = 10.0
_PIECE_BYTES = 16 << 10  # of requests, whose reads wait for as much; at the slowest speed it arrives within the window
_POLL_S = 0.2  # how soon a stopped transfer ends
# Every error of the session: those of requests are OSErrors, and those of httpx and httpx2 derive from an HTTPError of
# their own, except InvalidURL. HfHubHTTPError derives from the error class of the session's library.
_LIBRARY = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
TRANSPORT_ERRORS: tuple[type[BaseException], ...] = (
    OSError, *HfHubHTTPError.__bases__, getattr(_LIBRARY, "InvalidURL", OSError)
)  # fmt: skip


class _NoNewCookies(DefaultCookiePolicy):
    """Cookies that the user has set are sent; a server's are not kept."""

    def set_ok(self, cookie: Cookie, request: Any) -> bool:  # noqa: ARG002 - the interface of cookie jars
        return False


@dataclass(frozen=True)
class Answer:
    """The answer to a GET; `body` is read as it arrives. It is the file's only if there is no Content-Encoding.

    `hub_headers` are those of the first answer: the Hub describes a file there, and redirects to its storage.
    """

    status: int
    headers: Mapping[str, str]
    hub_headers: Mapping[str, str]
    body: Iterator[bytes]


@contextmanager
def get(url: str, headers: Mapping[str, str], stop: threading.Event | None = None) -> Iterator[Answer]:
    """Send a GET and yield the answer; redirects are followed.

    Raises one of TRANSPORT_ERRORS if there is no answer, if less than `SLOWEST_BYTES_PER_S` arrives over
    `SPEED_WINDOW_S` seconds of waiting, or once `stop` is set; ValueError for a redirect that leads to no HTTP address
    or to ever more redirects. All of this also while the body is read.
    """
    # The libraries bound each read of the socket, not their sum: a server that sends one byte at a time could hold
    # them for weeks within the headers alone. So another thread reads, and this one stops waiting for it.
    items: queue.Queue[Any] = queue.Queue(maxsize=16)
    ended = threading.Event()

    def put(item: Any) -> bool:
        while not ended.is_set():
            try:
                items.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def pump() -> None:
        try:
            with _open(url, headers) as (status, last, first, body):
                if put((status, last, first)) and all(map(put, body)):
                    put(None)
        except Exception as error:  # noqa: BLE001 - raised again where the answer is awaited
            put(error)

    threading.Thread(target=pump, daemon=True).start()
    received = _received(items, stop or threading.Event())
    try:
        status, last, first = next(received)
        yield Answer(status, last, first, received)
    finally:
        ended.set()


def _received(items: "queue.Queue[Any]", stop: threading.Event) -> Iterator[Any]:
    """Yield what the reading thread delivers, and measure its speed; time that the caller takes does not count."""
    waited, arrived = 0.0, 0
    while True:
        before = time.monotonic()
        try:
            item = items.get(timeout=_POLL_S)
        except queue.Empty:
            item = b""
        waited += time.monotonic() - before
        if stop.is_set():
            raise ConnectionAbortedError("stopped")
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        if item != b"":
            yield item
        arrived += len(item) if isinstance(item, bytes) else 0
        if arrived >= SLOWEST_BYTES_PER_S * SPEED_WINDOW_S:
            waited, arrived = 0.0, 0
        elif waited >= SPEED_WINDOW_S:
            raise TimeoutError(f"only {arrived} bytes arrived in {waited:.0f} s")


@contextmanager
def _open(url: str, headers: Mapping[str, str]) -> Iterator[tuple[int, Any, Any, Iterator[bytes]]]:
    session: Any = get_session()
    # `stream` is a method of httpx's Client and a flag of requests' Session.
    exchange = _httpx_exchange if callable(getattr(session, "stream", None)) else _requests_exchange
    send = exchange(session, url, headers)
    first = None
    for _ in range(MAX_REDIRECTS + 1):
        response, body, target = send()
        try:
            first = response.headers if first is None else first
            if target is None:
                yield response.status_code, response.headers, first, body
                return
            # The body of a redirect is left unread: it may have no end.
            if urlsplit(target).scheme not in ("http", "https"):
                raise ValueError(f"{url}: expected a redirect to an http or https address, got {target[:200]!r}")
        finally:
            response.close()
    raise ValueError(f"{url}: expected at most {MAX_REDIRECTS} redirects, got more")


_Send = Callable[[], tuple[Any, Iterator[bytes], str | None]]
"""Sends the next request; returns the response, its body, and where it redirects to (None: nowhere)."""


def _httpx_exchange(session: Any, url: str, headers: Mapping[str, str]) -> _Send:
    timeout = (_CONNECT_TIMEOUT_S, SPEED_WINDOW_S, SPEED_WINDOW_S, SPEED_WINDOW_S)
    # The session is shared by the whole program: one odd cookie would break each later request.
    session.cookies.jar.set_policy(_NoNewCookies())
    request = session.build_request("GET", url, headers=dict(headers), timeout=timeout)

    def send() -> tuple[Any, Iterator[bytes], str | None]:
        nonlocal request
        response = session.send(request, stream=True, follow_redirects=False)
        request = response.next_request  # without the token if it goes to another host
        return response, response.iter_raw(), None if request is None else str(request.url)

    return send


def _requests_exchange(session: Any, url: str, headers: Mapping[str, str]) -> _Send:
    request = session.prepare_request(importlib.import_module("requests").Request("GET", url, headers=dict(headers)))

    def send() -> tuple[Any, Iterator[bytes], str | None]:
        nonlocal request
        # Not session.send, which reads the bodies of redirects to their end.
        settings = session.merge_environment_settings(request.url, {}, True, None, None)
        timeout = (_CONNECT_TIMEOUT_S, SPEED_WINDOW_S)
        response = session.get_adapter(request.url).send(request, timeout=timeout, **settings)
        target = session.get_redirect_target(response)
        if target is not None:
            request = request.copy()  # rebuild_auth compares it with the one that the response has
            target = request.url = urljoin(request.url, target)
            session.rebuild_auth(request, response)  # drops the token if it goes to another host
            request.headers.pop("Cookie", None)  # and so do the user's cookies
            request.prepare_cookies(session.cookies)
        return response, response.iter_content(_PIECE_BYTES), target

    return send
