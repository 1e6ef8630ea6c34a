"""Find vision towers of the Hugging Face Hub on this machine, or download them: of the weights, only the tower's bytes.

The result is a local directory, which `qwenvit.weights.local` reads like any other.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from qwenvit.weights.adapters.adapter import ADAPTER_FILE
from qwenvit.weights.adapters.config import ADAPTER_CONFIG
from qwenvit.weights.adapters.names import is_adapter_name
from qwenvit.weights.header import read_header
from qwenvit.weights.hub.cache import HubCache, clean_subfolder, replace_file
from qwenvit.weights.hub.repository import Repository, Token
from qwenvit.weights.hub.tower import download_adapter, download_tower
from qwenvit.weights.local import CHECKPOINT_FILES, find_tensors

CONFIG = "config.json"
PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
SMALL_FILES = (CONFIG, *PROCESSOR_CONFIGS, "video_preprocessor_config.json", ADAPTER_CONFIG)
_MAX_LISTED = 5

CacheDir = str | Path | None


def fetch_tower(
    repo_id: str,
    *,
    subfolder: str | None = None,
    prefix: str | None = None,
    needs_config: bool = True,
    with_adapter: bool = True,
    revision: str | None = "main",
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return a local directory with the vision tower of `repo_id`, and download it if it is not on this machine.

    There are two places. huggingface_hub's cache, filled by transformers, vLLM or `hf download`, is used as it is
    wherever it has a commit's config and all shards with vision tensors. What is downloaded goes to a directory of our
    own for each commit, in huggingface_hub's assets cache (or under `<cache_dir>/assets`): `model.safetensors` (the
    tower alone, with official names without prefix and the checkpoint's dtypes), those of `SMALL_FILES` that the
    repository has, and the weights of an adapter beside the tower.

    The commit: a branch that was downloaded here stays pinned to that commit. Any other branch is at the commit at
    which huggingface_hub's cache has it, if that has the tower. No request is sent in either case, so that the answer
    is the same offline. Else the Hub is asked for the branch's commit. `force_download` asks in any case, fetches that
    commit's small files anew, downloads its tower if it is nowhere on this machine, and pins the branch to it. The
    next call resumes an interrupted download; until it is complete, the branch stays at the old commit.

    Args:
        repo_id: organisation/name.
        subfolder: the folder of the repository with the config and the weights; the result is this folder.
        prefix: which of several towers, see `find_tower`; the directory's tensors then keep their full names.
        needs_config: whether a repository or snapshot without `config.json` is refused.
        with_adapter: whether an adapter beside the tower is fetched with it.
        revision: a branch, a tag or a commit; None for main.
        token: as in huggingface_hub.
        cache_dir: as in huggingface_hub.
        local_files_only: send no request.
        force_download: see above.

    Raises:
        FileNotFoundError: no such repository, revision or file; offline and not on this machine.
        PermissionError: access is restricted.
        ConnectionError: no answer, or an interrupted download, which the next call resumes.
        OSError: the disk has too little space.
        ValueError: no safetensors, no vision tensors, a truncated file, one that changes or has another hash than the
            Hub says; a server that cannot send byte ranges or names what could lead out of the cache;
            `force_download` while offline.
    """

    def tower_problem(folder: Path) -> str | None:
        return _problem(partial(find_tensors, folder, prefix))

    def has_unmerged_adapter(folder: Path) -> bool:
        return any(map(is_adapter_name, find_tensors(folder, prefix)))

    def problem(folder: Path) -> str | None:
        if needs_config and not (folder / CONFIG).is_file():
            return f"no {CONFIG}"
        if (lacks := tower_problem(folder)) is not None:
            return lacks
        has_config, has_weights = ((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_FILE))
        if with_adapter and has_weights and not has_config:
            return f"{ADAPTER_FILE} without {ADAPTER_CONFIG}"
        if with_adapter and has_config and not has_weights and not has_unmerged_adapter(folder):
            return f"{ADAPTER_CONFIG} without {ADAPTER_FILE}"
        return None

    def download(repository: Repository, folder: Path) -> None:
        has_weights = any(name in repository.files for name in CHECKPOINT_FILES)  # else download_tower names the format
        if needs_config and has_weights and CONFIG not in repository.files:
            raise FileNotFoundError(
                f"{repo_id} ({revision or 'main'}): the repository has no file {repository.url(CONFIG)}"
            )
        has_adapter = with_adapter and ADAPTER_CONFIG in repository.files
        if has_adapter and ADAPTER_FILE in repository.files:
            download_adapter(repository, folder)
        if tower_problem(folder) is not None:  # it may be there without its adapter
            download_tower(repository, folder, prefix)
        if has_adapter and ADAPTER_FILE not in repository.files and not has_unmerged_adapter(folder):
            download_adapter(repository, folder)  # raises

    part = _Part("vision tower", SMALL_FILES, problem, download, "" if prefix is None else prefix.rstrip("."))
    found = _fetch(part, repo_id, subfolder, revision, token, cache_dir, local_files_only, force_download)
    if not any((found / name).is_file() for name in PROCESSOR_CONFIGS) and "snapshots" in found.parts:
        warnings.warn(
            f"{found} has none of {', '.join(PROCESSOR_CONFIGS)}: if the repository has them, `hf download {repo_id} "
            f"--include '*processor*'` adds them; until then the family's own bounds and normalisation are used",
            stacklevel=2,
        )
    return found


def fetch_adapter(
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = "main",
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return a local directory with the adapter of `repo_id`: `adapter_config.json` and `adapter_model.safetensors`.

    Arguments, places, commits and errors are those of `fetch_tower`. The adapter is downloaded whole.
    """

    def problem(folder: Path) -> str | None:
        if not (folder / ADAPTER_CONFIG).is_file():
            return f"no {ADAPTER_CONFIG}"
        return _problem(partial(read_header, folder / ADAPTER_FILE))

    part = _Part("adapter", (ADAPTER_CONFIG,), problem, download_adapter)
    return _fetch(part, repo_id, subfolder, revision, token, cache_dir, local_files_only, force_download)


def fetch_config(
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = "main",
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return a local directory with the `config.json` of `repo_id`; no other file is guaranteed to be there.

    The commit is the one that `fetch_tower` would use, and no request is sent if that commit's tower is there.
    `force_download` fetches the file anew at the revision's current commit, and leaves the pin of `fetch_tower` as it
    is. Offline, the commit is the pinned one, or that of the last call, or huggingface_hub's.

    Raises the errors of `fetch_tower`.
    """
    revision, folder = revision or "main", clean_subfolder(subfolder)
    offline = _is_offline(local_files_only, force_download)
    cache = HubCache(repo_id, cache_dir)
    pinned = None if force_download else cache.pinned_commit(revision)
    shared = None if force_download else cache.shared_commit(revision)
    if pinned is not None:
        commits = [pinned]
    elif shared is not None and any(
        _problem(partial(find_tensors, place)) is None for place in cache.places(shared, folder)
    ):
        commits = [shared]
    else:
        commits = []
    unconfirmed = [] if force_download else [seen for seen in (cache.seen_commit(revision), shared) if seen is not None]

    def find(commits: list[str]) -> Path | None:
        places = (place for commit in commits for place in cache.places(commit, folder))
        return next((place for place in places if (place / CONFIG).is_file()), None)

    if (found := find(commits or unconfirmed * offline)) is not None:
        return found
    if offline:
        raise _offline_error(cache, CONFIG, repo_id, revision, folder, lambda place: _absent(place / CONFIG))
    try:
        repository = Repository(repo_id, pinned or revision, folder, token)
    except ConnectionError as error:
        if (found := find(unconfirmed)) is None:
            raise
        warnings.warn(f"{error}; {found / CONFIG} is used, which is on this machine", stacklevel=2)
        return found
    if CONFIG not in repository.files:
        raise FileNotFoundError(f"{repo_id} ({revision}): the repository has no file {repository.url(CONFIG)}")
    directory = cache.directory(repository.commit, folder)
    if force_download or not (directory / CONFIG).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / CONFIG, repository.read(CONFIG))
    cache.note_seen(revision, repository.commit)
    return directory


@dataclass(frozen=True)
class _Part:
    """Something of a repository that is fetched: `problem` says why a folder lacks it (None: it is there)."""

    what: str
    small_files: tuple[str, ...]
    problem: Callable[[Path], str | None]
    download: Callable[[Repository, Path], None]
    variant: str = ""


def _fetch(
    part: _Part,
    repo_id: str,
    subfolder: str | None,
    revision: str | None,
    token: Token,
    cache_dir: CacheDir,
    local_files_only: bool,
    force_download: bool,
) -> Path:
    revision, folder = revision or "main", clean_subfolder(subfolder)
    offline = _is_offline(local_files_only, force_download)
    cache = HubCache(repo_id, cache_dir, part.variant)

    def find(commit: str) -> Path | None:
        return next((place for place in cache.places(commit, folder) if part.problem(place) is None), None)

    pinned = None if force_download else cache.pinned_commit(revision)
    known = None if force_download else pinned or cache.shared_commit(revision)
    if known is not None and (found := find(known)) is not None:
        return found
    if offline:
        raise _offline_error(cache, f"its {part.what}", repo_id, revision, folder, part.problem)
    repository = Repository(repo_id, pinned or revision, folder, token)
    commit, directory = repository.commit, cache.directory(repository.commit, folder)
    directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(directory / ".lock"):
        # Another process may have downloaded it while this one waited for the lock.
        if force_download or find(commit) is None:
            small = _write_small_files(part, repository, directory)
            snapshot = cache.snapshot(commit, folder)
            differs = any(_content(snapshot / name) != data for name, data in small.items())
            if part.problem(directory) is not None and (differs or part.problem(snapshot) is not None):
                part.download(repository, directory)
        # Only force_download may overwrite a pin that another process set meanwhile.
        if force_download or (cache.pinned_commit(revision) is None and part.problem(directory) is None):
            cache.pin(revision, commit)
    found = find(commit)
    if found is None:
        raise ValueError(f"{directory}: expected a complete download, got {part.problem(directory)}")
    return found


def _write_small_files(part: _Part, repository: Repository, directory: Path) -> dict[str, bytes]:
    """Fetch the small files that the repository has into the directory, and return their content by name."""
    small = {name: repository.read(name) for name in part.small_files if name in repository.files}
    for name, data in small.items():
        replace_file(directory / name, data)
    return small


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _absent(file: Path) -> str | None:
    return None if file.is_file() else f"no {file.name}"


def _problem(check: Callable[[], object]) -> str | None:
    """Return why `check`, which reads headers, finds no complete file; None if it does."""
    try:
        return None if check() else "no tensors"
    except (OSError, ValueError) as error:
        return str(error)


def _is_offline(local_files_only: bool, force_download: bool) -> bool:
    offline = local_files_only or constants.HF_HUB_OFFLINE
    if offline and force_download:
        raise ValueError(
            "force_download=True needs the network, which local_files_only=True (or HF_HUB_OFFLINE) forbids: "
            "use only one of them"
        )
    return offline


def _offline_error(
    cache: HubCache, what: str, repo_id: str, revision: str, folder: str, problem: Callable[[Path], str | None]
) -> FileNotFoundError:
    """Return the error for what is not on this machine; it says what is, and what that lacks."""
    known = cache.pinned_commit(revision) or cache.shared_commit(revision)
    at = f"at commit {known}" if known is not None else "of which no commit is known here"
    found = []
    for commit in cache.commits():
        for place in cache.places(commit, folder):
            if place.is_dir():
                lacks = problem(place)
                found.append(
                    f"{place}: "
                    + (f"complete: pass revision={commit!r}" if lacks is None else lacks.removeprefix(f"{place}/"))
                )
    on_disk = f"; on this machine: {'; '.join(found[:_MAX_LISTED])}" if found else ""
    more = f"; and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return FileNotFoundError(
        f"{repo_id} ({revision}), {at}: {what} is not complete on this machine, and the network is off "
        f"(local_files_only or HF_HUB_OFFLINE){on_disk}{more}; download it once with the network on, or pass a local "
        "directory"
    )
