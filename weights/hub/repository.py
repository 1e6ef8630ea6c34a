"""One commit of a Hub repository: which files it has, and their bytes, checked against the Hub's hashes."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from qwenvit.weights.header import TensorEntry, header_length, parse_header
from qwenvit.weights.hub.cache import is_commit
from qwenvit.weights.hub.errors import explain_hub_errors
from qwenvit.weights.hub.reader import HubReader
from qwenvit.weights.strict_json import parse_json

Token = str | bool | None

MAX_SMALL_BYTES = 64 << 20
"""The largest listing, config or index that is read; an index of 300,000 tensors is smaller."""
# Size of the first request for a shard: most headers are smaller, and need no second one.
HEADER_GUESS_BYTES = 256 << 10
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub's listing says of a file; None: it does not say."""

    size: int | None  # in bytes
    sha256: str | None  # of large files
    git_sha1: str | None  # of small ones, as git computes it


def _headers(token: Token) -> dict[str, str]:
    """Return the headers of all requests; ValueError, without its value, for a token that no header can have."""
    if isinstance(token, str):
        token = token.strip()  # as read from a file
        if not (token.isascii() and token.isprintable()):
            raise ValueError("token: expected printable ASCII characters, got others")
    return build_hf_headers(token=token)


class Repository:
    """The files of one folder of a repository at its current commit of `revision`.

    Attributes: `commit`; `files` by their names in the folder; `reader`; `heads`, the bytes before the tensors of each
    file whose header was read.

    Raises the errors of `explain_hub_errors`, and ValueError for a listing that is no listing, or whose names or commit
    could lead out of the cache.
    """

    def __init__(self, repo_id: str, revision: str, subfolder: str, token: Token) -> None:
        self.repo_id, self._subfolder = repo_id, subfolder
        headers = _headers(token)
        url = f"{constants.ENDPOINT}/api/models/{repo_id}/revision/{quote(revision, safe='')}?blobs=true"
        with explain_hub_errors(repo_id, revision):
            listing = parse_json(HubReader(headers).read(url, MAX_SMALL_BYTES), url)
        self.commit = _commit_of(listing, url)
        if is_commit(revision) and self.commit != revision:
            raise ValueError(f"{url}: expected commit {revision}, got {self.commit}")
        prefix = f"{subfolder}/" if subfolder else ""
        files = {name.removeprefix(prefix): file for name, file in _files_of(listing, url) if name.startswith(prefix)}
        self.files = {name: file for name, file in files.items() if "/" not in name}
        self.reader = HubReader(headers, self.commit)
        self.heads: dict[str, bytes] = {}

    @property
    def where(self) -> Path:
        """The folder's name in messages."""
        return Path(self.repo_id, self._subfolder)

    def url(self, name: str) -> str:
        """Return the address of a file."""
        return hf_hub_url(self.repo_id, name, subfolder=self._subfolder, revision=self.commit)

    def read(self, name: str) -> bytes:
        """Return the content of a small file, which must have the hash that the Hub lists.

        Raises ValueError if it has another or is too large, and the errors of `explain_hub_errors`.
        """
        with explain_hub_errors(self.repo_id, self.commit):
            data = self.reader.read(self.url(name), MAX_SMALL_BYTES)
        file = self.files.get(name, RemoteFile(None, None, None))
        git = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
        git.update(data)
        if file.sha256 is not None:
            self.check_sha256(name, hashlib.sha256(data).hexdigest())
        elif file.git_sha1 not in (None, git.hexdigest()):
            raise ValueError(f"{self.where / name}: expected git's hash {file.git_sha1}, got {git.hexdigest()}")
        return data

    def header(self, name: str) -> dict[str, TensorEntry]:
        """Return every tensor of a safetensors file, from its header; errors name it `where / name`.

        Raises ValueError for a file that is truncated or not a safetensors file, and the errors of
        `explain_hub_errors`.
        """
        url, file, reader = self.url(name), self.where / name, self.reader
        with explain_hub_errors(self.repo_id, self.commit):
            data = b"".join(reader.stream(url, 0, HEADER_GUESS_BYTES))
            size = reader.versions[url].size
            end = 8 + header_length(data, file, size)
            if end > len(data):
                data += b"".join(reader.stream(url, len(data), end - len(data)))
        entries = parse_header(data[8:end], file, size)
        listed = self.files[name].size if name in self.files else None
        if listed is not None and size not in (None, listed):
            raise ValueError(f"{file}: expected {listed} bytes by the repository's listing, got a file of {size}")
        self.heads[name] = data[:end]
        return entries

    def sha256(self, name: str) -> str | None:
        """Return the hash of a large file as the Hub lists it, or else sends it with the file (None: neither)."""
        version = self.reader.versions.get(self.url(name))
        listed = self.files[name].sha256 if name in self.files else None
        return listed or (None if version is None else version.sha256)

    def check_sha256(self, name: str, actual: str) -> None:
        """Raise ValueError unless `actual` is the SHA-256 that the Hub gives for a file, or it gives none."""
        if self.sha256(name) not in (None, actual):
            raise ValueError(f"{self.where / name}: expected SHA-256 {self.sha256(name)} as the Hub says, got {actual}")


def _commit_of(listing: Any, url: str) -> str:
    commit = listing.get("sha") if isinstance(listing, dict) else None
    if not is_commit(commit):
        raise ValueError(f"{url}: sha: expected a commit of 40 hex digits, got {str(commit)[:80]!r}")
    return str(commit)


def _files_of(listing: dict[str, Any], url: str) -> list[tuple[str, RemoteFile]]:
    siblings = listing.get("siblings")
    if not isinstance(siblings, list) or not all(isinstance(sibling, dict) for sibling in siblings):
        raise ValueError(f"{url}: siblings: expected a list of objects, got {str(siblings)[:80]!r}")
    files = []
    for sibling in siblings:
        name, lfs = sibling.get("rfilename"), sibling.get("lfs")
        # Odd names of other files are harmless: only known names are ever used. Git allows colons and backslashes.
        if not isinstance(name, str) or {"", ".", ".."} & {*re.split(r"[/\\]", name)} or "\0" in name:
            raise ValueError(f"{url}: rfilename: expected a path within the repository, got {str(name)[:200]!r}")
        size = sibling.get("size")
        if isinstance(lfs, dict):
            file = RemoteFile(_size(size, name, url), _hash(lfs.get("sha256"), 64, name, url), None)
        else:
            file = RemoteFile(_size(size, name, url), None, _hash(sibling.get("blobId"), 40, name, url))
        files.append((name, file))
    return files


def _size(value: Any, name: str, url: str) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{url}: {name}: size: expected a number of bytes, got {str(value)[:80]!r}")
    return value


def _hash(value: Any, digits: int, name: str, url: str) -> str | None:
    if value is not None and not (isinstance(value, str) and len(value) == digits and _HASH.fullmatch(value)):
        raise ValueError(f"{url}: {name}: expected a hash of {digits} hex digits, got {str(value)[:80]!r}")
    return value
