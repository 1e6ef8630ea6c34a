"""A Hub on 127.0.0.1: the endpoints that huggingface_hub uses, with the faults of real servers."""

import contextlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
MODEL_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)")


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    served: int = 0  # bytes of body


@dataclass
class Hub:
    """Serves `folder` as the repository `repo_id`. The fields after the first three configure faults."""

    folder: Path
    repo_id: str = "org/model"
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    token: str | None = None  # required for every file
    gated: bool = False  # every file is refused
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
        request = Request(self.command, self.path, headers.get("Range"), headers.get("Authorization"))
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
            names = [{"rfilename": str(f.relative_to(hub.folder))} for f in sorted(hub.folder.iterdir())]
            return self.send(200, json.dumps({"id": hub.repo_id, "sha": commit, "siblings": names}).encode(), {})
        if hub.gated:
            return self.refuse(403, "GatedRepo")
        file = hub.folder / match["file"]
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", commit)
        body = file.read_bytes()[: hub.truncated.get(file.name)]
        fields = {"X-Repo-Commit": commit, "ETag": f'"{commit[:8]}-{file.name}"', "Accept-Ranges": "bytes"}
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
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = self.hub.take(len(body)) if status == 206 else len(body)
        try:
            self.wfile.write(body[:sent])
        except ConnectionError:
            sent = 0
        if request is not None:
            request.served += sent
        self.close_connection |= sent < len(body)
