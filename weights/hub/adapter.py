"""Adapters by the name that a user gives: a folder, a file, or a repository of the Hugging Face Hub."""

import os
import re
from pathlib import Path

from qwenvit.weights.hub.cache import snapshot_in
from qwenvit.weights.hub.fetch import fetch_adapter


def locate_adapter(
    adapter: str | os.PathLike[str],
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Return the local folder or .safetensors file of an adapter, for `read_adapter`.

    `adapter` is an existing path (also a `models--ORG--NAME` folder of huggingface_hub's cache) or a Hub repository,
    whose `main` branch is used. The other arguments are those of `fetch_tower`.

    Raises FileNotFoundError (no such repository or file), PermissionError (gated), ConnectionError (no answer), and
    ValueError (neither a path nor a repository's name; no adapter in safetensors).
    """
    name = os.fspath(adapter)
    path = Path(name).expanduser()
    if name and path.exists():
        return snapshot_in(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, re.ASCII) or name.endswith(".safetensors"):
        raise ValueError(
            f"adapter: expected an existing folder or file, or a Hub repository (organisation/name), got {name!r}"
        )
    try:
        return fetch_adapter(
            name,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise type(error)(f"adapter: {error}; nor is there a local folder {name!r}") from error
