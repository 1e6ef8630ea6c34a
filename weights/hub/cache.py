"""Where files of a Hub repository are kept on this machine, and at which commit a branch is.

Two places: our own, in huggingface_hub's assets cache, for what this package downloads; and huggingface_hub's own cache
(`models--org--name/snapshots/<commit>`), which transformers, vLLM and `hf download` fill and this package only reads.
Folders are named by the caller and by commits of 40 hex digits, never by what else a server says.
"""

import hashlib
import os
import re
import uuid
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import validate_repo_id

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REF_BYTES = 1024


def is_commit(revision: object) -> bool:
    """Return whether `revision` is a full commit hash, 40 hex digits."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def clean_subfolder(subfolder: str | None) -> str:
    """Return the path of a folder within a repository as "a/b"; "" for None, the repository itself.

    Raises TypeError if it is no string, and ValueError if it is absolute or leads out of the repository.
    """
    if subfolder is None:
        return ""
    if not isinstance(subfolder, str):
        raise TypeError(f"subfolder: expected a string, got {type(subfolder).__name__}")
    cleaned = subfolder.removesuffix("/")
    if subfolder and not is_plain_path(cleaned):
        raise ValueError(f"subfolder: expected a folder within the repository such as 'a/b', got {subfolder!r}")
    return cleaned


def is_plain_path(name: str) -> bool:
    """Return whether `name` is a relative path that stays below its folder on every system."""
    # A backslash and a colon separate folders and drives on Windows.
    return all(part not in ("", ".", "..") for part in name.split("/")) and not re.search(r"[\\:\x00-\x1f]", name)


class HubCache:
    """The two places of one repository.

    Args:
        repo_id: organisation/name.
        cache_dir: the folder of huggingface_hub's cache, with ours in its folder `assets`; None: as `HF_HUB_CACHE`,
            `HF_ASSETS_CACHE` and `HF_HOME` say.
        variant: what tells our folders from others of the same commit: the prefix of one of several towers.

    Raises:
        ValueError: `repo_id` is no name of a repository.
    """

    def __init__(self, repo_id: str, cache_dir: str | Path | None, variant: str = "") -> None:
        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            raise ValueError(f"repo_id: {error}") from None
        hub = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser().resolve()
        assets = hub / "assets" if cache_dir is not None else Path(constants.HF_ASSETS_CACHE).expanduser().resolve()
        # huggingface_hub's `cached_assets_path`, without creating it: a failed lookup must not leave folders.
        self.own = assets / "qwenvit" / repo_id.replace("/", "--")
        self._variant = f"prefix-{hashlib.sha256(variant.encode()).hexdigest()[:16]}" if variant else ""
        self.shared = hub / f"models--{repo_id.replace('/', '--')}"

    def directory(self, commit: str, subfolder: str) -> Path:
        """Return our own folder of a commit, whether it is there or not."""
        return _below(self.own, commit, subfolder) / self._variant

    def snapshot(self, commit: str, subfolder: str) -> Path:
        """Return huggingface_hub's folder of a commit, whether it is there or not."""
        return _below(self.shared / "snapshots", commit, subfolder)

    def places(self, commit: str, subfolder: str) -> tuple[Path, Path]:
        """Return both folders of a commit, ours first."""
        return self.directory(commit, subfolder), self.snapshot(commit, subfolder)

    def commits(self) -> list[str]:
        """Return the commits of which either place has a folder."""
        folders = [self.own, self.shared / "snapshots"]
        return sorted({entry.name for f in folders if f.is_dir() for entry in f.iterdir() if is_commit(entry.name)})

    def pinned_commit(self, revision: str) -> str | None:
        """Return the commit that a complete download pinned `revision` to, or `revision` itself if it is a commit."""
        return revision if is_commit(revision) else _read_commit(self._ref("refs", revision))

    def pin(self, revision: str, commit: str) -> None:
        """Pin `revision` to `commit`, atomically."""
        if revision != commit:
            self._write(self._ref("refs", revision), f"{commit} {revision}\n")

    def seen_commit(self, revision: str) -> str | None:
        """Return the commit of `revision` when its config was fetched last (None: never)."""
        return _read_commit(self._ref("config-refs", revision))

    def note_seen(self, revision: str, commit: str) -> None:
        """Note that the Hub has `revision` at `commit` now."""
        if revision != commit:
            self._write(self._ref("config-refs", revision), f"{commit} {revision}\n")

    def shared_commit(self, revision: str) -> str | None:
        """Return the commit at which huggingface_hub's cache has `revision` (None: it does not know it).

        Every tool's request for any file of the repository may move it.
        """
        return _read_commit(self.shared / "refs" / revision) if is_plain_path(revision) else None

    def _ref(self, kind: str, revision: str) -> Path:
        # Hashed, because a branch's name may contain slashes, be long, or differ from another one in case alone.
        return self.own / kind / hashlib.sha256(revision.encode()).hexdigest()

    def _write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text.encode())


def replace_file(file: Path, data: bytes) -> None:
    """Write `data` to `file`, whole or not at all."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def snapshot_in(folder: Path) -> Path:
    """Return the snapshot to use in a `models--org--name` folder of huggingface_hub's cache, or `folder` if it is none.

    That is the one of the branch main, or else the only one. Raises ValueError, which lists them, if there are several.
    """
    snapshots = folder / "snapshots"
    if not (folder.name.startswith("models--") and snapshots.is_dir()):
        return folder
    found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
    main = _read_commit(folder / "refs" / "main")
    chosen = [entry for entry in found if entry.name == main] or found
    if len(chosen) != 1:
        listed = ", ".join(str(entry) for entry in found[:5]) or "none"
        raise ValueError(f"{folder}: expected the branch main or one snapshot, got {len(found)} ({listed}): pass one")
    return chosen[0]


def _below(folder: Path, commit: str, subfolder: str) -> Path:
    if not is_commit(commit):
        raise ValueError(f"commit: expected 40 hex digits, got {commit[:80]!r}")
    return folder / commit / subfolder


def _read_commit(file: Path) -> str | None:
    """Return the commit in a file that begins with one (None: no such file, or a damaged one)."""
    try:
        with file.open("rb") as stream:
            text = stream.read(_MAX_REF_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    # A power cut can leave an empty file.
    commit = text.split(maxsplit=1)[0] if text.strip() else ""
    return commit if is_commit(commit) else None
