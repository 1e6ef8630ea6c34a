"""What a server can do to one transfer: errors, waits, drips, redirects, and files that change."""

import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from huggingface_hub.utils import get_session

from qwenvit.weights.hub import reader, session
from qwenvit.weights.hub.reader import HubReader, StatusError, TransferError
from support.hub_server import Hub, Reply

DATA = random.Random(0).randbytes(300_000)
COMMIT = "a" * 40


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(reader, "RETRY_WAITS_S", (0.0, 0.0))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "data").write_bytes(DATA)
    with Hub(folder) as server:
        yield server


def url(server: Hub) -> str:
    return f"{server.url}/org/model/resolve/main/data"


def read(server: Hub, first: int = 0, length: int = len(DATA), reader: HubReader | None = None) -> bytes:
    return b"".join((reader or HubReader({})).stream(url(server), first, length))


def lie(server: Hub, number: int = 10**6, **changes: object) -> None:
    """Change the next replies; `fields` are added to the headers, and those of value None taken away."""

    def change(method: str, path: str, reply: Reply) -> None:
        nonlocal number
        if number > 0:
            number -= 1
            for name, value in changes.items():
                if name == "fields":
                    reply.fields = {k: v for k, v in (reply.fields | value).items() if v is not None}
                else:
                    setattr(reply, name, value)

    server.lie = change


@pytest.mark.parametrize("endless", [False, True])
def test_a_few_kilobytes_of_an_errors_body_are_read(server, endless):
    body = b"Come back never. " * 4_000_000
    lie(
        server, status=404, body=body[: 8192 if endless else None], endless=endless, fields={"Content-Length": "9" * 12}
    )
    tracemalloc.start()
    try:
        for what in (lambda: read(server), lambda: HubReader({}).read(url(server), 1 << 30)):
            with pytest.raises(StatusError, match=r"status 404 \(Come back never. Come") as error:
                what()
            assert len(str(error.value)) < 400
        assert tracemalloc.get_traced_memory()[1] < len(body)  # the server's own bytes are not counted twice
    finally:
        tracemalloc.stop()
        server.go_on.set()


def test_retry_after_is_kept_to(server, monkeypatch):
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=2.5), usegmt=True)
    for asked, least in (("1", 1.0), (moment, 0.5), ("soon", 0.0), ("-5", 0.0), (None, 0.0)):
        lie(server, 1, status=429, fields={"Retry-After": asked, "Content-Length": "0"}, body=b"")
        before = time.monotonic()
        assert read(server) == DATA
        assert least <= time.monotonic() - before < least + 10


@pytest.mark.parametrize("asked", ["3600", "999999999", "Fri, 31 Dec 2399 23:59:59 GMT"])
def test_a_server_that_asks_for_a_long_wait_gets_no_retry(server, asked):
    lie(server, status=503, fields={"Retry-After": asked, "Content-Length": "0"}, body=b"")
    with pytest.raises(TransferError, match=r"status 503; the server asks for no request in the next \d+ s"):
        read(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("part", ["slow_head", "drips"])
def test_a_server_that_drips_is_as_good_as_silent(server, monkeypatch, part):
    monkeypatch.setattr(session, "SPEED_WINDOW_S", 0.5)
    lie(server, **{part: True})
    before = time.monotonic()
    for what in (lambda: read(server), lambda: HubReader({}).read(url(server), 1 << 30)):
        with pytest.raises(TransferError, match=r"only \d+ bytes arrived in \d s"):
            what()
    assert len(server.requests) == 6  # each attempt starts anew
    assert time.monotonic() - before < 30
    server.requests.clear()
    lie(server, 1, **{part: True})
    assert read(server) == DATA


def test_a_slow_server_above_the_limit_is_read(server, monkeypatch):
    monkeypatch.setattr(session, "SPEED_WINDOW_S", 0.5)
    lie(server, drips=True, pause_s=0.0005)  # some 1,500 bytes a second at least
    monkeypatch.setattr(session, "SLOWEST_BYTES_PER_S", 200)
    assert read(server, 0, 2000) == DATA[:2000]
    assert len(server.requests) == 1


def test_a_slow_caller_is_no_slow_server(server, monkeypatch):
    monkeypatch.setattr(session, "SPEED_WINDOW_S", 0.3)
    pieces = HubReader({}).stream(url(server), 0, len(DATA))
    first = next(pieces)
    time.sleep(1)
    assert first + b"".join(pieces) == DATA
    assert len(server.requests) == 1


def test_a_stopped_transfer_ends_at_once(server):
    lie(server, slow_head=True)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    before = time.monotonic()
    with pytest.raises(TransferError, match="stopped"):
        next(HubReader({}).stream(url(server), 0, 100, stop))
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"ETag": '"other"'}, "the file changed on the server"),
        ({"X-Linked-Etag": "f" * 64}, "the file changed on the server"),
        ({"Content-Range": "bytes 100-199/300001"}, "the file changed on the server"),
        ({"Content-Range": "bytes 100-199/199"}, "expected a part within the file"),
        ({"Content-Length": "99"}, "expected a part of the file"),
        ({"Content-Range": "bytes 100-199/" + "9" * 5000}, "expected a part of the file"),
        ({"Content-Range": "bytes 100-99/300000"}, "expected a part of the file"),
        ({"Content-Range": "bytes 100-198/300000"}, "expected a part of the file"),
        ({"Content-Range": "items 100-199/300000"}, "expected a part of the file"),
        ({"Content-Range": None}, "expected a part of the file"),
        ({"Content-Encoding": "gzip"}, "got Content-Encoding 'gzip'"),
        ({"X-Repo-Commit": "b" * 40}, f"expected a file of commit {COMMIT}, got one of 'bbb"),
    ],
)
def test_an_answer_that_contradicts_an_earlier_one_is_refused(server, fields, told):
    reader = HubReader({}, COMMIT)
    lie(server, fields={"X-Linked-Etag": "e" * 64})
    assert read(server, 0, 100, reader) == DATA[:100]
    lie(server, fields=fields)
    with pytest.raises(ValueError, match=told):
        read(server, 100, 100, reader)
    assert len(server.requests) == 2


def test_a_file_that_changes_in_the_middle_of_a_range_is_refused(server):
    server.drops = 1

    def change(method: str, path: str, reply: Reply) -> None:
        if not reply.fields["Content-Range"].startswith("bytes 0-"):
            reply.fields["ETag"] = '"other"'

    server.lie = change
    with pytest.raises(ValueError, match="the file changed on the server during the download"):
        read(server)


def test_an_answer_that_says_less_is_no_contradiction(server):
    reader = HubReader({}, COMMIT)
    assert read(server, 0, 100, reader) == DATA[:100]
    lie(server, fields={"ETag": None, "X-Repo-Commit": None, "Content-Range": "bytes 100-199/*"})
    assert read(server, 100, 100, reader) == DATA[100:200]


@pytest.mark.parametrize("cookie", ["a=b", "a=\xe9", "a=" + "x" * 5000])
def test_cookies_are_not_kept(server, cookie):
    """huggingface_hub's session is the whole program's."""
    lie(server, 1, fields={"Set-Cookie": cookie})
    assert read(server) == DATA
    assert not get_session().cookies
    assert read(server) == DATA


def test_a_weak_etag_is_the_same_version(server):
    reader = HubReader({})
    lie(server, 1, fields={"ETag": 'W/"x"'})
    assert read(server, 0, 100, reader) == DATA[:100]
    lie(server, fields={"ETag": '"x"'})
    assert read(server, 100, 100, reader) == DATA[100:200]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://localhost/x", "gopher://localhost/"])
def test_a_redirect_to_no_http_address_is_refused(server, location):
    lie(server, status=302, fields={"Location": location})
    with pytest.raises(ValueError, match="expected a redirect to an http or https address, got "):
        read(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("location", ["http://[", "data:,x", "http://\x01", "http://a b/", "//", "http://:99999999/"])
def test_a_redirect_to_nowhere_is_an_error(server, location):
    lie(server, status=302, fields={"Location": location})
    with pytest.raises((ValueError, ConnectionError)):
        read(server)


def test_redirects_without_end_are_refused(server):
    lie(server, status=302, fields={"Location": url(server)})
    with pytest.raises(ValueError, match=r"expected at most 10 redirects, got more"):
        read(server)
    assert len(server.requests) == 11


def test_the_body_of_a_redirect_is_not_read(server, tmp_path):
    with Hub(server.folder) as storage:
        fields = {"Location": storage.url + "/org/model/resolve/main/data", "Content-Length": None}
        lie(server, status=302, endless=True, fields=fields | {"Connection": "close"})
        assert read(server) == DATA
        assert HubReader({}).read(url(server), 1 << 20) == DATA
        server.go_on.set()


@pytest.mark.parametrize("size", [None, len(DATA) - 1])
def test_a_small_file_has_a_limit(server, size):
    if size is None:  # the end of the connection is the end of the file
        lie(server, fields={"Content-Length": None, "Connection": "close"}, endless=True)
    with pytest.raises(ValueError, match="expected at most 299999 bytes, got more"):
        HubReader({}).read(url(server), len(DATA) - 1)
    server.go_on.set()


def test_a_small_file_that_breaks_off_is_read_again(server):
    lie(server, 1, cut=1000)
    assert HubReader({}).read(url(server), 1 << 20) == DATA
    assert len(server.requests) == 2
    lie(server, cut=1000)
    with pytest.raises(TransferError, match="did not arrive"):
        HubReader({}).read(url(server), 1 << 20)


@pytest.fixture(params=["huggingface_hub's session", "requests"])
def either_session(request, monkeypatch):
    """huggingface_hub before its version 1 has sessions of requests."""
    if request.param == "requests":
        requests = pytest.importorskip("requests")
        monkeypatch.setattr(session, "get_session", requests.Session)
    monkeypatch.setattr(session, "SPEED_WINDOW_S", 0.5)


def test_sessions_of_both_libraries(either_session, server):
    with Hub(server.folder) as storage:
        reader = HubReader({"Authorization": "Bearer secret"})
        lie(server, status=302, fields={"Location": f"{storage.url}/org/model/resolve/main/data"}, endless=True)
        assert read(server, 5, 100_000, reader) == DATA[5:100_005]
        assert reader.read(url(server), 1 << 20) == DATA
        assert {request.authorization for request in server.requests} == {"Bearer secret"}
        assert {request.authorization for request in storage.requests} == {None}
    server.go_on.set()
    for changes, told in (
        ({"status": 404}, "status 404"),
        ({"slow_head": True}, "arrived in"),
        ({"drips": True}, "arrived in"),
        ({"cut": 100}, "did not arrive"),
        ({"status": 302, "fields": {"Location": "file:///etc/passwd"}}, "expected a redirect to an http or https"),
        ({"fields": {"Content-Encoding": "gzip"}}, "Content-Encoding 'gzip'"),
    ):
        server.go_on.clear()
        lie(server, **changes)
        with pytest.raises((ValueError, StatusError, TransferError), match=told):
            HubReader({}).read(url(server), 1 << 20)
        server.go_on.set()


def test_two_servers_may_have_two_etags_for_one_file(server):
    reader = HubReader({})
    for number, etag in enumerate(("one", "two")):
        lie(server, fields={"ETag": f'"{etag}"', "X-Linked-Etag": "e" * 64})
        assert read(server, 100 * number, 100, reader) == DATA[100 * number :][:100]


def test_a_transfer_that_gets_on_has_all_its_retries_again(server, monkeypatch):
    monkeypatch.setattr(reader, "PROGRESS_BYTES", 20_000)
    lie(server, cut=30_000)
    assert read(server) == DATA
    assert len(server.requests) == -(-len(DATA) // 30_000) > 1 + len(reader.RETRY_WAITS_S)
    lie(server, cut=1000)
    with pytest.raises(TransferError, match="did not arrive"):
        read(server)


def test_the_hubs_own_rate_limit_is_kept_to(server):
    limit = {"RateLimit": '"api";r=0;t=1'}
    lie(server, 1, status=429, fields=limit)
    before = time.monotonic()
    assert read(server) == DATA
    assert time.monotonic() - before >= 1
    lie(server, status=429, fields=limit | {"RateLimit": '"api";r=0;t=3000'})
    with pytest.raises(TransferError, match="asks for no request in the next 3000 s"):
        read(server)


def test_the_users_cookies_stay_with_their_host(server, monkeypatch):
    requests = pytest.importorskip("requests")
    with Hub(server.folder) as storage, requests.Session() as own:
        own.headers["Cookie"] = "sso=SECRET"
        monkeypatch.setattr(session, "get_session", lambda: own)
        lie(server, status=302, fields={"Location": f"{storage.url}/org/model/resolve/main/data"})
        assert read(server, 0, 100) == DATA[:100]
        assert [request.cookie for request in storage.requests] == [None]
