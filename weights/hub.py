"""A vision tower from the Hugging Face Hub: of the checkpoint, only the tower's bytes are downloaded.

The Hub is nothing more than a way to make a directory, which `qwenvit.weights.local` reads as any other.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from qwenvit.weights.header import TensorEntry, build_header, header_length, parse_header, read_header
from qwenvit.weights.local import CANDIDATES, nothing_error, read_index, vision_tensors
from qwenvit.weights.names import find_prefix
from qwenvit.weights.ranges import (
    TRANSPORT_ERRORS,
    Chunk,
    RangeReader,
    TransferError,
    cut,
    download,
    journal_of,
)

SINGLE = "model.safetensors"
CONFIGS = (
    "config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# A shard's header is usually smaller than this: one request instead of two.
HEADER_GUESS_BYTES = 256 << 10

Token = str | bool | None
CacheDir = str | Path | None

_HUB_ERRORS: tuple[type[BaseException], ...] = (EntryNotFoundError, *TRANSPORT_ERRORS)


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
    `<cache_dir>/assets`), one for each commit. If the commit last seen for `revision` is there, no request
    is sent; `force_download` asks the Hub anew where the branch stands, and downloads if that commit's tower
    is not there. An interrupted download goes on where it broke off.

    Raises FileNotFoundError (no such repository, revision or file; offline and not there), PermissionError
    (gated), ConnectionError (broke off: call again), and ValueError (only pickles, no vision tensors, a
    truncated shard, a server that cannot send byte ranges).
    """
    revision = revision or "main"
    offline = local_files_only or constants.HF_HUB_OFFLINE
    if offline or not force_download:
        commit = _last_seen(repo_id, revision, cache_dir)
        if commit is not None and _is_whole(directory := _directory(repo_id, commit, cache_dir)):
            return directory
    if offline:
        raise FileNotFoundError(
            f"{repo_id} ({revision}): its vision tower is not on this machine, and the network is off "
            "(local_files_only or HF_HUB_OFFLINE); fetch it once with network, or give a local directory"
        )
    with _explained(repo_id, revision):
        config = hf_hub_download(repo_id, CONFIGS[0], revision=revision, token=token, cache_dir=cache_dir)
    commit = Path(config).parent.name
    directory = _directory(repo_id, commit, cache_dir)
    with WeakFileLock(directory / ".lock"):
        # Another process may have fetched it while this one waited.
        if not _is_whole(directory):
            _fetch(repo_id, commit, token, cache_dir, directory)
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

    Raises what `fetch_tower` raises for a repository that cannot be reached.
    """
    with _explained(repo_id, revision or "main"):
        config = hf_hub_download(
            repo_id,
            CONFIGS[0],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    return Path(config).parent


def _last_seen(repo_id: str, revision: str, cache_dir: CacheDir) -> str | None:
    """Return the commit that `revision` had when huggingface_hub last asked for it."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    config = try_to_load_from_cache(repo_id, CONFIGS[0], cache_dir=cache_dir, revision=revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _directory(repo_id: str, commit: str, cache_dir: CacheDir) -> Path:
    assets = None if cache_dir is None else Path(cache_dir) / "assets"
    return cached_assets_path("qwenvit", repo_id, commit, assets_dir=assets)


def _is_whole(directory: Path) -> bool:
    """Tell whether a fetch was finished here (the tensors come last) and the file still has its full size."""
    try:
        return bool(read_header(directory / SINGLE)) and (directory / CONFIGS[0]).is_file()
    except (FileNotFoundError, ValueError):
        return False


def _fetch(repo_id: str, commit: str, token: Token, cache_dir: CacheDir, directory: Path) -> None:
    def cached(name: str) -> Path:
        with _explained(repo_id, commit):
            return Path(hf_hub_download(repo_id, name, revision=commit, token=token, cache_dir=cache_dir))

    with _explained(repo_id, commit):
        siblings = HfApi().model_info(repo_id, revision=commit, token=token).siblings or []
    files = {sibling.rfilename for sibling in siblings}
    for name in CONFIGS:
        if name in files:
            shutil.copyfile(cached(name), directory / name)

    reader = RangeReader(build_hf_headers(token=token))

    def url(file: Path) -> str:
        return hf_hub_url(repo_id, file.name, revision=commit)

    def header_of(file: Path) -> dict[str, TensorEntry]:
        with _explained(repo_id, commit):
            return _remote_header(reader, url(file), file)

    candidates = [Path(repo_id, name) for name in CANDIDATES if name in files]
    if not candidates:
        raise nothing_error(Path(repo_id), sorted(files))
    entries = vision_tensors(candidates, lambda file: read_index(cached(file.name)), header_of)
    prefix = find_prefix(entries)
    entries = {name.removeprefix(prefix): entry for name, entry in entries.items()}
    source = {"format": "pt", "source": f"{repo_id}@{commit}", "source_prefix": prefix}
    head, begins = build_header(entries, source)
    chunks = _chunks([(url(entry.file), entry, begins[name]) for name, entry in entries.items()])
    incomplete = directory / f"{SINGLE}.incomplete"
    with _explained(repo_id, commit):
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


@contextmanager
def _explained(repo_id: str, revision: str) -> Iterator[None]:
    """Turn what goes wrong on the way to the Hub into one line that names the repository and what to do."""
    try:
        yield
    except TransferError as error:
        raise ConnectionError(
            f"{repo_id}: the download broke off; what has come is kept, and the next call goes on from there ({error})"
        ) from error
    except _HUB_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the network's
        raise _explanation(error, repo_id, revision) from error


def _explanation(error: BaseException, repo_id: str, revision: str) -> OSError:
    where, page = f"{repo_id} ({revision})", f"{constants.ENDPOINT}/{repo_id}"
    # Where huggingface_hub finds neither the Hub nor a cached file, the server's own answer is the cause.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    response = getattr(cause, "response", None)
    status = None if response is None else response.status_code
    if isinstance(cause, RevisionNotFoundError):
        return FileNotFoundError(f"{where}: the repository is there, this revision is not")
    if isinstance(cause, GatedRepoError) or status == 403:
        return PermissionError(
            f"{where}: access is restricted: accept the licence at {page}, then pass token=... or run `hf auth login`"
        )
    if isinstance(cause, RepositoryNotFoundError) or status == 401:
        return FileNotFoundError(
            f"{where}: no such repository, or a private one: check the name at {page}; for a private one "
            "pass a valid token=... or run `hf auth login`"
        )
    if response is not None and status == 404:
        return FileNotFoundError(f"{where}: has no file {response.url}")
    return ConnectionError(f"{where}: no answer from {constants.ENDPOINT}: {cause}")
