"""From the name of a model to the folder or file of its checkpoint."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qwenvit.config.published import PUBLISHED
from qwenvit.weights.hub.cache import clean_subfolder, snapshot_in
from qwenvit.weights.hub.fetch import fetch_config, fetch_tower


def locate(
    model: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    prefix: str | None = None,
    revision: str | None = None,
    config_only: bool = False,
    needs_config: bool = True,
    with_adapter: bool = True,
    **hub: Any,
) -> Path:
    """Return the local directory or `.safetensors` file of a model, after fetching it from the Hub if necessary.

    Args:
        model: an existing path, a Hub repository, or a short name of `qwenvit.registry.PUBLISHED`. A path may also be
            a `models--organisation--name` folder of huggingface_hub's cache.
        subfolder: the folder inside the model's that has the checkpoint.
        prefix: the tower's prefix in a checkpoint with several, of which only this one is fetched.
        revision: branch, tag or commit of a repository.
        config_only: fetch no weights; the directory may then contain only `config.json`.
        needs_config: whether a repository without `config.json` is refused.
        with_adapter: whether an adapter beside a repository's tower is fetched with it.
        **hub: `token`, `cache_dir`, `local_files_only`, `force_download` (see `fetch_tower`).

    Raises:
        ValueError: neither an existing path nor the name of a repository; an impossible `subfolder`.
        ConnectionError, FileNotFoundError: the Hub cannot be reached or does not have the files.
    """
    name = os.fspath(model)
    subfolder = clean_subfolder(subfolder) or None
    path = Path(name).expanduser()
    if name and path.exists():
        return _local(path, subfolder, revision)
    if name in PUBLISHED:
        name = PUBLISHED[name].repo_id
    organisation, slash, repository = name.partition("/")
    is_path = "/" in repository or organisation in (".", "..", "~") or repository.endswith(".safetensors")
    if not (slash and organisation and repository) or is_path:
        known = {"demo": "demo"} | {key: key for key in PUBLISHED}
        known |= {published.repo_id.partition("/")[2]: published.repo_id for published in PUBLISHED.values()}
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {known[near[0]]!r}?" if near else "`qwenvit info` lists the published ones"
        raise ValueError(
            f"model: {name!r} is no existing path, no Hub repository (organisation/name), no known name; {hint}"
        )
    hub |= {"subfolder": subfolder, "revision": revision}
    try:
        return (
            fetch_config(name, **hub)
            if config_only
            else fetch_tower(name, prefix=prefix, needs_config=needs_config, with_adapter=with_adapter, **hub)
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise type(error)(f"{error}; nor is there a local folder {name!r}") from error


def _local(path: Path, subfolder: str | None, revision: str | None) -> Path:
    snapshot = snapshot_in(path)
    if snapshot != path and revision is not None:
        raise ValueError(f"revision: expected None with a local folder, {path} (pass its snapshot), got {revision!r}")
    if subfolder is None:
        return snapshot
    if not snapshot.is_dir():
        raise ValueError(f"subfolder: expected None with a file, {snapshot}, got {subfolder!r}")
    if not (snapshot / subfolder).is_dir():
        folders = ", ".join(sorted(folder.name for folder in snapshot.iterdir() if folder.is_dir())) or "none"
        raise FileNotFoundError(f"subfolder: {snapshot} has no folder {subfolder!r}; it has: {folders}")
    return snapshot / subfolder


def directory_of(source: Path) -> Path:
    """Return the directory of a checkpoint's JSON files."""
    return source if source.is_dir() else source.parent
