"""Download a vision tower from the Hugging Face Hub: of the checkpoint, only the tower's bytes.

The result is a local directory, which `qwenvit.weights.local` reads like any other.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from qwenvit.weights.errors import explain_hub_errors
from qwenvit.weights.header import TensorEntry, build_header, header_length, parse_header, read_header
from qwenvit.weights.local import CHECKPOINT_FILES, find_vision_tensors, no_checkpoint_error, read_index
from qwenvit.weights.names import find_prefix
from qwenvit.weights.ranges import Chunk, RangeReader, download, journal_path, split

TOWER_FILE = "model.safetensors"
CONFIG = "config.json"
CONFIG_FILES = (
    CONFIG,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# Size of the first request for a shard: most headers are smaller, and need no second one.
HEADER_GUESS_BYTES = 256 << 10
_INFO_TIMEOUT_S = 30.0

Token = str | bool | None
CacheDir = str | Path | None


def fetch_tower(
    repo_id: str,
    *,
    revision: str | None = "main",
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return a local directory with the vision tower of `repo_id`, and download it if it is not there yet.

    The directory contains `model.safetensors` (the tower alone, with official names without prefix and the checkpoint's
    dtypes) and those of `CONFIG_FILES` that the repository has. Each commit has its own directory in huggingface_hub's
    assets cache (or under `<cache_dir>/assets`). A branch stays pinned to the commit of its first download, and once
    that commit's tower is there, no request is sent. `force_download` asks the Hub for the branch's current commit,
    downloads that commit's tower if it is not there, and pins the branch to it. The next call resumes an interrupted
    download; until it is complete, the branch stays pinned to the old commit.

    Raises FileNotFoundError (no such repository, revision or file; offline and not downloaded), PermissionError
    (gated), ConnectionError (no answer, or an interrupted download: call again), and ValueError (only pickles, no
    vision tensors, a truncated shard, a server that cannot send byte ranges, `force_download` while offline).
    """
    revision = revision or "main"
    offline = _is_offline(local_files_only, force_download)
    commit = None if force_download else _pinned_commit(repo_id, revision, cache_dir)
    if commit is not None and _is_complete(directory := _assets_directory(repo_id, commit, cache_dir)):
        return directory
    if offline:
        raise FileNotFoundError(
            f"{repo_id} ({revision}): its vision tower is not on this machine, and the network is off "
            "(local_files_only or HF_HUB_OFFLINE); download it once with the network on, or pass a local directory"
        )
    if force_download:
        commit = _current_commit(repo_id, revision, token)
    elif commit is None:
        commit = _cached_file(repo_id, CONFIG, revision, token, cache_dir).parent.name
    directory = _assets_directory(repo_id, commit, cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(directory / ".lock"):
        # Another process may have downloaded it while this one waited for the lock.
        if not _is_complete(directory):
            _download_tower(repo_id, commit, token, cache_dir, directory)
        # Only force_download may overwrite a pin that another process set meanwhile.
        if force_download or _pinned_commit(repo_id, revision, cache_dir) is None:
            _pin(repo_id, revision, commit, cache_dir)
    return directory


def fetch_config(
    repo_id: str,
    *,
    revision: str | None = "main",
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return a local directory with the `config.json` of `repo_id`; no other file is guaranteed to be there.

    The commit is the one that `fetch_tower` would use, and no request is sent if that commit's tower is there.
    `force_download` uses the revision's current commit, and leaves the pin of `fetch_tower` as it is.

    Raises FileNotFoundError (no such repository, revision or file; offline and not downloaded), PermissionError
    (gated), ConnectionError (no answer), and ValueError (`force_download` while offline).
    """
    revision = revision or "main"
    offline = _is_offline(local_files_only, force_download)
    commit = (
        _current_commit(repo_id, revision, token) if force_download else _pinned_commit(repo_id, revision, cache_dir)
    )
    if commit is not None and _is_complete(directory := _assets_directory(repo_id, commit, cache_dir)):
        return directory
    # With force_download, request the branch's name rather than its commit, so that huggingface_hub's cache finds the
    # file under that name when the network is off.
    name = revision if force_download else commit or revision
    snapshot = _cached_file(repo_id, CONFIG, name, token, cache_dir, offline).parent
    if commit is not None and snapshot.name != commit:
        snapshot = _cached_file(repo_id, CONFIG, commit, token, cache_dir).parent
    return snapshot


def _cached_file(
    repo_id: str, name: str, revision: str, token: Token, cache_dir: CacheDir, offline: bool = False
) -> Path:
    """Return a small file of the repository in huggingface_hub's own cache, and download it if it is not there."""
    with explain_hub_errors(repo_id, revision):
        file = hf_hub_download(
            repo_id, name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=offline
        )
    return Path(file)


def _is_offline(local_files_only: bool, force_download: bool) -> bool:
    offline = local_files_only or constants.HF_HUB_OFFLINE
    if offline and force_download:
        raise ValueError(
            "force_download=True needs the network, which local_files_only=True (or HF_HUB_OFFLINE) forbids: "
            "use only one of them"
        )
    return offline


def _model_info(repo_id: str, revision: str, token: Token) -> ModelInfo:
    with explain_hub_errors(repo_id, revision):
        return HfApi().model_info(repo_id, revision=revision, token=token, timeout=_INFO_TIMEOUT_S)


def _current_commit(repo_id: str, revision: str, token: Token) -> str:
    """Return the current commit of `revision` on the Hub.

    `hf_hub_download` would not do: it falls back to its cache when the Hub does not answer.
    """
    commit = _model_info(repo_id, revision, token).sha
    if commit is None:
        raise ConnectionError(f"{repo_id} ({revision}): {constants.ENDPOINT} does not report its commit")
    return commit


def _assets_directory(repo_id: str, name: str, cache_dir: CacheDir) -> Path:
    """Return huggingface_hub's `cached_assets_path`, without creating it: a failed lookup must not leave folders."""
    assets = Path(constants.HF_ASSETS_CACHE) if cache_dir is None else Path(cache_dir) / "assets"
    return assets.expanduser().resolve() / "qwenvit" / repo_id.replace("/", "--") / name


def _pin_file(repo_id: str, revision: str, cache_dir: CacheDir) -> Path:
    # Hashed, because a branch's name may contain slashes, be long, or differ from another one in case alone.
    return _assets_directory(repo_id, "refs", cache_dir) / hashlib.sha256(revision.encode()).hexdigest()


def _pinned_commit(repo_id: str, revision: str, cache_dir: CacheDir) -> str | None:
    """Return the commit that a branch is pinned to (None: not downloaded yet), or `revision` itself if it is a commit.

    A branch is pinned by a complete download. huggingface_hub's own refs are no substitute: every request for a file of
    the repository moves them.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        commit = _pin_file(repo_id, revision, cache_dir).read_text("utf-8").partition(" ")[0]
    except FileNotFoundError:
        return None
    # A power cut can leave an empty file.
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _pin(repo_id: str, revision: str, commit: str, cache_dir: CacheDir) -> None:
    """Pin `revision` to `commit`, atomically; the caller holds the lock of that commit's directory."""
    if revision == commit:
        return
    file = _pin_file(repo_id, revision, cache_dir)
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(f"{file.name}.{commit}")
    temporary.write_text(f"{commit} {revision}\n", "utf-8")
    os.replace(temporary, file)


def _is_complete(directory: Path) -> bool:
    """Return whether a download to `directory` is complete (tensors come last) and not truncated since."""
    try:
        return bool(read_header(directory / TOWER_FILE)) and (directory / CONFIG).is_file()
    except (FileNotFoundError, ValueError):
        return False


def _download_tower(repo_id: str, commit: str, token: Token, cache_dir: CacheDir, directory: Path) -> None:
    """Download the tower and the config files of `commit` to `directory`; the caller holds its lock."""
    files = {sibling.rfilename for sibling in _model_info(repo_id, commit, token).siblings or []}
    for name in CONFIG_FILES:
        if name in files:
            shutil.copyfile(_cached_file(repo_id, name, commit, token, cache_dir), directory / name)

    reader = RangeReader(build_hf_headers(token=token))

    def url(file: Path) -> str:
        return hf_hub_url(repo_id, file.name, revision=commit)

    def header_of(file: Path) -> dict[str, TensorEntry]:
        with explain_hub_errors(repo_id, commit):
            return _remote_header(reader, url(file), file)

    candidates = [Path(repo_id, name) for name in CHECKPOINT_FILES if name in files]
    if not candidates:
        raise no_checkpoint_error(Path(repo_id), sorted(files))
    entries = find_vision_tensors(
        candidates, lambda file: read_index(_cached_file(repo_id, file.name, commit, token, cache_dir)), header_of
    )
    prefix = find_prefix(entries)
    entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    source = {"format": "pt", "source": f"{repo_id}@{commit}", "source_prefix": prefix}
    head, starts = build_header(entries, source)
    chunks = _plan_chunks([(url(entry.file), entry, starts[name]) for name, entry in entries.items()])
    incomplete = directory / f"{TOWER_FILE}.incomplete"
    with explain_hub_errors(repo_id, commit):
        download(reader, chunks, head, incomplete, description=f"{repo_id} (vision tower)")
    read_header(incomplete)
    # Rename the tensors last: a file under the final name means that the download is complete.
    os.replace(incomplete, directory / TOWER_FILE)
    journal_path(incomplete).unlink()


def _remote_header(reader: RangeReader, url: str, file: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the safetensors file at `url`, from its header; errors name it `file`."""
    data = b"".join(reader.stream(url, 0, HEADER_GUESS_BYTES))
    end = 8 + header_length(data, file, reader.sizes[url])
    if end > len(data):
        data += b"".join(reader.stream(url, len(data), end - len(data)))
    return parse_header(data[8:end], file, reader.sizes[url])


def _plan_chunks(tensors: Iterable[tuple[str, TensorEntry, int]]) -> list[Chunk]:
    """Return the chunks to download for tensors (URL, entry there, target byte); neighbours share chunks."""
    runs: list[Chunk] = []
    for url, entry, target in sorted(tensors, key=lambda tensor: tensor[2]):
        last = runs[-1] if runs else None
        if last and last.url == url and last.source + last.length == entry.start:
            runs[-1] = Chunk(url, last.source, last.target, last.length + entry.nbytes)
        else:
            runs.append(Chunk(url, entry.start, target, entry.nbytes))
    return [chunk for run in runs for chunk in split(run)]
