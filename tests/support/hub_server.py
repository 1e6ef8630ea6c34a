"""A Hub on 127.0.0.1: the endpoints that huggingface_hub uses, with the faults of real servers."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
MODEL_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/?]+)(\?blobs=true)?")


def file_sha256(file: Path) -> str:
    return _file_sha256(file, file.stat().st_mtime_ns)


@cache
def _file_sha256(file: Path, _: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    cookie: str | None
    served: int = 0  # bytes of body


@dataclass
class Hub:
    """Serves `folder` as the repository `repo_id`. The fields after the first three configure faults."""

    folder: Path
    repo_id: str = "org/model"
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    token: str | None = None  # required for every file
    gated: bool = False  # every file is refused
    lists_hashes: bool = True  # sizes and hashes in the listing, and the hash of large files in `X-Linked-Etag`
    ignores_ranges: bool = False
    truncated: dict[str, int] = field(default_factory=dict)  # file -> its size in bytes after truncation
    drops: int = 0  # number of range responses that break off halfway
    statuses: list[int] = field(default_factory=list)  # of the next range responses, which are errors
    starts: int | None = None  # the byte at which range responses start, whatever the request says
    budget: int | None = None  # bytes of range responses, after which every connection breaks
    stalls: bool = False  # whether such a connection stays open and silent until `go_on` is set
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    storage: "Hub | None" = None  # another host, to which requests for tensors are redirected
    lie: "Callable[[str, str, Reply], None] | None" = None  # changes replies: method, path, reply
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "Hub":
        self.lock = threading.Lock()

        class Handler(_Handler):
            hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def served(self) -> int:
        return sum(request.served for request in self.requests)

    def tensor_requests(self) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(".safetensors")]

    def tensor_bytes(self) -> int:
        return sum(request.served for request in self.tensor_requests())

    def describe(self, file: Path) -> dict[str, object]:
        """Return the listing's entry for a file."""
        entry: dict[str, object] = {"rfilename": file.relative_to(self.folder).as_posix()}
        if self.lists_hashes:
            data = file.read_bytes()
            entry |= {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
            if file.suffix == ".safetensors":
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": file_sha256(file), "size": len(data)}}
        return entry

    def take(self, wanted: int) -> int:
        """Return how many of `wanted` tensor bytes to send before the connection breaks."""
        with self.lock:
            if self.drops > 0:
                self.drops -= 1
                return wanted // 2
            if self.budget is None:
                return wanted
            granted = min(wanted, self.budget)
            self.budget -= granted
        if self.stalls and granted < wanted:
            self.stalled.set()
            self.go_on.wait()
        return granted


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        # Tests break connections on purpose.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, headers = self.hub, self.headers
        request = Request(
            self.command, self.path, headers.get("Range"), headers.get("Authorization"), headers.get("Cookie")
        )
        hub.requests.append(request)
        info, resolve = MODEL_INFO.fullmatch(self.path), RESOLVE.fullmatch(self.path)
        match = info or resolve
        if match is None or match["repo"] != hub.repo_id:
            return self.refuse(404, "RepoNotFound")
        if hub.token and request.authorization != f"Bearer {hub.token}":
            return self.refuse(401, "RepoNotFound")
        commit = hub.revisions.get(match["revision"], match["revision"])
        if commit not in hub.revisions.values():
            return self.refuse(404, "RevisionNotFound")
        if info:
            listed = [hub.describe(file) for file in sorted(hub.folder.rglob("*")) if file.is_file()]
            listing = {"id": hub.repo_id, "sha": commit, "siblings": listed}
            return self.send(200, json.dumps(listing).encode(), {}, request)
        if hub.gated:
            return self.refuse(403, "GatedRepo")
        file = hub.folder / match["file"]
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", commit)
        body = file.read_bytes()[: hub.truncated.get(file.name)]
        fields = {"X-Repo-Commit": commit, "ETag": f'"{file_sha256(file)}"', "Accept-Ranges": "bytes"}
        if hub.lists_hashes and file.suffix == ".safetensors":
            fields["X-Linked-Etag"] = f'"{file_sha256(file)}"'
        if file.suffix == ".safetensors" and hub.storage is not None:
            return self.send(302, b"", fields | {"Location": hub.storage.url + self.path})
        if request.range is None or hub.ignores_ranges:
            return self.send(200, body, fields, request)
        with hub.lock:
            status = hub.statuses.pop(0) if hub.statuses else 206
        if status != 206:
            return self.refuse(status, "")
        first, last = map(int, request.range.removeprefix("bytes=").split("-"))
        if hub.starts is not None:
            first, last = hub.starts, hub.starts + last - first
        part = body[first : last + 1]
        if not part:
            return self.refuse(416, "Range")
        fields["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
        return self.send(206, part, fields, request)

    def refuse(self, status: int, code: str, commit: str = "") -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Repo-Commit": commit})

    def send(self, status: int, body: bytes, fields: dict[str, str], request: Request | None = None) -> None:
        reply = Reply(status, fields | {"Content-Length": str(len(body))}, body)
        if self.hub.lie is not None:
            self.hub.lie(self.command, self.path, reply)
        sent = self.hub.take(len(reply.body)) if reply.status == 206 and self.command == "GET" else len(reply.body)
        reply.cut = min(sent, len(reply.body) if reply.cut is None else reply.cut)
        try:
            written = self.write(reply)
        except ConnectionError:
            written = 0
            self.close_connection = True
        if request is not None and self.command == "GET":
            request.served += written
        self.close_connection |= written < len(body)

    def write(self, reply: "Reply") -> int:
        """Send the reply; return how many bytes of its body."""
        line = f"HTTP/1.1 {reply.status} {reply.reason}\r\n"
        head = line + "".join(f"{name}: {value}\r\n" for name, value in reply.fields.items()) + "\r\n"
        if reply.slow_head:
            self.drip(head.encode("latin-1"), reply)
        else:
            self.wfile.write(head.encode("latin-1"))
        if self.command == "HEAD":
            return len(reply.body)
        body = reply.body[: reply.cut]
        if reply.drips:
            self.drip(body, reply)
        else:
            self.wfile.write(body)
        while reply.endless and not self.hub.go_on.is_set():
            self.wfile.write(bytes(64 << 10))
        self.close_connection |= reply.endless or reply.drips
        return len(body)

    def drip(self, data: bytes, reply: "Reply") -> None:
        for index in range(len(data)):
            self.wfile.write(data[index : index + 1])
            if self.hub.go_on.wait(reply.pause_s):
                return


@dataclass
class Reply:
    """What goes over the wire; `Hub.lie` may change it."""

    status: int
    fields: dict[str, str]
    body: bytes
    reason: str = "OK"
    cut: int | None = None  # bytes of body, after which the connection closes
    slow_head: bool = False  # headers byte by byte
    drips: bool = False  # body byte by byte
    pause_s: float = 0.02
    endless: bool = False  # zeros follow the body
