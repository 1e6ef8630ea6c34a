"""A vision tower from the Hugging Face Hub: of the checkpoint, only the tower's bytes are downloaded.

The Hub is nothing more than a way to make a directory, which `qwenvit.weights.local` reads as any other.
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

from qwenvit.weights.errors import explained
from qwenvit.weights.header import TensorEntry, build_header, header_length, parse_header, read_header
from qwenvit.weights.local import CANDIDATES, nothing_error, read_index, vision_tensors
from qwenvit.weights.names import find_prefix
from qwenvit.weights.ranges import Chunk, RangeReader, cut, download, journal_of

SINGLE = "model.safetensors"
CONFIGS = (
    "config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# A shard's header is usually smaller than this: one request instead of two.
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
    """Return a local directory with the vision tower of `repo_id`, downloading what is not there yet.

    It holds `model.safetensors` (the tower alone, official names without prefix, the checkpoint's dtypes)
    and those of `CONFIGS` that the repository has. It lies in huggingface_hub's assets cache (or under
    `<cache_dir>/assets`), one for each commit. A branch stays at the commit it was first fetched at, and once
    that tower is there no request is sent; `force_download` asks the Hub where the branch stands now, moves
    there, and downloads if that commit's tower is not there. An interrupted download goes on where it broke
    off, and until it is whole the branch stays where it was.

    Raises FileNotFoundError (no such repository, revision or file; offline and not there), PermissionError
    (gated), ConnectionError (no answer, or broke off: call again), and ValueError (only pickles, no vision
    tensors, a truncated shard, a server that cannot send byte ranges, `force_download` while offline).
    """
    revision = revision or "main"
    offline = _is_offline(local_files_only, force_download)
    commit = None if force_download else _pinned(repo_id, revision, cache_dir)
    if commit is not None and _is_whole(directory := _directory(repo_id, commit, cache_dir)):
        return directory
    if offline:
        raise FileNotFoundError(
            f"{repo_id} ({revision}): its vision tower is not on this machine, and the network is off "
            "(local_files_only or HF_HUB_OFFLINE); fetch it once with network, or give a local directory"
        )
    if force_download:
        commit = _current(repo_id, revision, token)
    elif commit is None:
        commit = _cached(repo_id, CONFIGS[0], revision, token, cache_dir).parent.name
    directory = _directory(repo_id, commit, cache_dir)
    directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(directory / ".lock"):
        # Another process may have fetched it while this one waited.
        if not _is_whole(directory):
            _fetch(repo_id, commit, token, cache_dir, directory)
        # Without being asked to, never move what another process has pinned meanwhile.
        if force_download or _pinned(repo_id, revision, cache_dir) is None:
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
    """Return a local directory with the `config.json` of `repo_id`, and nothing else that can be counted on.

    It is of the commit that `fetch_tower` would take, and no request is sent if that tower is there.
    `force_download` looks at the revision's current commit, and does not move the tower there.

    Raises what `fetch_tower` raises for a repository that cannot be reached.
    """
    revision = revision or "main"
    offline = _is_offline(local_files_only, force_download)
    commit = _current(repo_id, revision, token) if force_download else _pinned(repo_id, revision, cache_dir)
    if commit is not None and _is_whole(directory := _directory(repo_id, commit, cache_dir)):
        return directory
    # When forced, by the name all the same: huggingface_hub then finds it by that name when the network is off.
    name = revision if force_download else commit or revision
    snapshot = _cached(repo_id, CONFIGS[0], name, token, cache_dir, offline).parent
    if commit is not None and snapshot.name != commit:
        snapshot = _cached(repo_id, CONFIGS[0], commit, token, cache_dir).parent
    return snapshot


def _cached(repo_id: str, name: str, revision: str, token: Token, cache_dir: CacheDir, offline: bool = False) -> Path:
    """Return the file in huggingface_hub's own cache, where the small files go."""
    with explained(repo_id, revision):
        file = hf_hub_download(
            repo_id, name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=offline
        )
    return Path(file)


def _is_offline(local_files_only: bool, force_download: bool) -> bool:
    offline = local_files_only or constants.HF_HUB_OFFLINE
    if offline and force_download:
        raise ValueError(
            "force_download=True asks the Hub, and local_files_only=True (or HF_HUB_OFFLINE) forbids that: "
            "leave one of them out"
        )
    return offline


def _info(repo_id: str, revision: str, token: Token) -> ModelInfo:
    with explained(repo_id, revision):
        return HfApi().model_info(repo_id, revision=revision, token=token, timeout=_INFO_TIMEOUT_S)


def _current(repo_id: str, revision: str, token: Token) -> str:
    """Return the commit that `revision` has on the Hub now.

    Not through `hf_hub_download`, which falls back to what it has in its cache when the Hub does not answer.
    """
    commit = _info(repo_id, revision, token).sha
    if commit is None:
        raise ConnectionError(f"{repo_id} ({revision}): {constants.ENDPOINT} does not tell its commit")
    return commit


def _directory(repo_id: str, name: str, cache_dir: CacheDir) -> Path:
    """Return where `cached_assets_path` puts this, without creating it: looking must leave no trace."""
    assets = Path(constants.HF_ASSETS_CACHE) if cache_dir is None else Path(cache_dir) / "assets"
    return assets.expanduser().resolve() / "qwenvit" / repo_id.replace("/", "--") / name


def _ref(repo_id: str, revision: str, cache_dir: CacheDir) -> Path:
    # Hashed, since a branch's name may hold slashes, be long, or differ from another's in case alone.
    return _directory(repo_id, "refs", cache_dir) / hashlib.sha256(revision.encode()).hexdigest()


def _pinned(repo_id: str, revision: str, cache_dir: CacheDir) -> str | None:
    """Return the commit at which `revision` was last fetched whole.

    huggingface_hub's own refs cannot tell: whatever asks for any file of the repository moves them.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        commit = _ref(repo_id, revision, cache_dir).read_text("utf-8").partition(" ")[0]
    except FileNotFoundError:
        return None
    # A power cut can leave an empty file.
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _pin(repo_id: str, revision: str, commit: str, cache_dir: CacheDir) -> None:
    """Note, in one step, that the tower of `revision` is that of `commit`, whose lock the caller holds."""
    if revision == commit:
        return
    ref = _ref(repo_id, revision, cache_dir)
    ref.parent.mkdir(exist_ok=True)
    part = ref.with_name(f"{ref.name}.{commit}")
    part.write_text(f"{commit} {revision}\n", "utf-8")
    os.replace(part, ref)


def _is_whole(directory: Path) -> bool:
    """Tell whether a fetch was finished here (the tensors come last) and the file still has its full size."""
    try:
        return bool(read_header(directory / SINGLE)) and (directory / CONFIGS[0]).is_file()
    except (FileNotFoundError, ValueError):
        return False


def _fetch(repo_id: str, commit: str, token: Token, cache_dir: CacheDir, directory: Path) -> None:
    files = {sibling.rfilename for sibling in _info(repo_id, commit, token).siblings or []}
    for name in CONFIGS:
        if name in files:
            shutil.copyfile(_cached(repo_id, name, commit, token, cache_dir), directory / name)

    reader = RangeReader(build_hf_headers(token=token))

    def url(file: Path) -> str:
        return hf_hub_url(repo_id, file.name, revision=commit)

    def header_of(file: Path) -> dict[str, TensorEntry]:
        with explained(repo_id, commit):
            return _remote_header(reader, url(file), file)

    candidates = [Path(repo_id, name) for name in CANDIDATES if name in files]
    if not candidates:
        raise nothing_error(Path(repo_id), sorted(files))
    entries = vision_tensors(
        candidates, lambda file: read_index(_cached(repo_id, file.name, commit, token, cache_dir)), header_of
    )
    prefix = find_prefix(entries)
    entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    source = {"format": "pt", "source": f"{repo_id}@{commit}", "source_prefix": prefix}
    head, begins = build_header(entries, source)
    chunks = _chunks([(url(entry.file), entry, begins[name]) for name, entry in entries.items()])
    incomplete = directory / f"{SINGLE}.incomplete"
    with explained(repo_id, commit):
        download(reader, chunks, head, incomplete, description=f"{repo_id} (vision tower)")
    read_header(incomplete)
    # Last of all, so that the file's presence under its name means that everything is there.
    os.replace(incomplete, directory / SINGLE)
    journal_of(incomplete).unlink()


def _remote_header(reader: RangeReader, url: str, file: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the safetensors file at `url` from its header; `file` names it in errors."""
    data = b"".join(reader.stream(url, 0, HEADER_GUESS_BYTES))
    end = 8 + header_length(data, file, reader.sizes[url])
    if end > len(data):
        data += b"".join(reader.stream(url, len(data), end - len(data)))
    return parse_header(data[8:end], file, reader.sizes[url])


def _chunks(tensors: Iterable[tuple[str, TensorEntry, int]]) -> list[Chunk]:
    """Return what to download for tensors (URL, place there, byte where it goes), neighbours in one go."""
    runs: list[Chunk] = []
    for url, entry, target in sorted(tensors, key=lambda tensor: tensor[2]):
        last = runs[-1] if runs else None
        if last and last.url == url and last.source + last.length == entry.start:
            runs[-1] = Chunk(url, last.source, last.target, last.length + entry.nbytes)
        else:
            runs.append(Chunk(url, entry.start, target, entry.nbytes))
    return [chunk for run in runs for chunk in cut(run)]
