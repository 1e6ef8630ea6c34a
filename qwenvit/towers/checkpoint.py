"""Load and save towers: find a model's files, read its config, load its weights, write a tower alone."""

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from qwenvit.arguments import Impl
from qwenvit.config.published import PUBLISHED
from qwenvit.config.vision_config import VisionConfig
from qwenvit.towers.choose import Tower, tower_class
from qwenvit.weights.hub import fetch_config, fetch_tower
from qwenvit.weights.local import checkpoint_dtype, find_tensors, load_tensors, save_tensors


def locate(model: str | os.PathLike[str], *, config_only: bool = False, **hub: Any) -> Path:
    """Return the local directory or `.safetensors` file of a model, after fetching it from the Hub if necessary.

    Args:
        model: an existing path, a Hub repository, or a short name of `qwenvit.registry.PUBLISHED`.
        config_only: fetch no weights; the directory may then contain only `config.json`.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` (see `fetch_tower`).

    Raises:
        ValueError: neither an existing path nor the name of a repository.
        ConnectionError, FileNotFoundError: the Hub cannot be reached or does not have the files.
    """
    name = os.fspath(model)
    path = Path(name).expanduser()
    if name and path.exists():
        return path
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
    try:
        return fetch_config(name, **hub) if config_only else fetch_tower(name, **hub)
    except (ConnectionError, FileNotFoundError) as error:
        raise type(error)(f"{error}; nor is there a local folder {name!r}") from error


def directory_of(source: Path) -> Path:
    """Return the directory of a checkpoint's JSON files."""
    return source if source.is_dir() else source.parent


def read_config(source: Path) -> VisionConfig:
    """Read the tower's config from the `config.json` of a checkpoint.

    Args:
        source: the checkpoint's directory, or its `.safetensors` file, which `config.json` is beside.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: `config.json` is not JSON, or describes no tower of a known family.
    """
    path = directory_of(source) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {path.parent}: it tells which tower the weights are for")
    try:
        return VisionConfig.from_hf(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def refuse_whole_checkpoint(directory: Path) -> None:
    """Refuse to write a tower into a directory with a whole checkpoint.

    The tower would overwrite the checkpoint's files, or loading would prefer these to the tower's.

    Raises:
        ValueError: the directory has such files, which the message lists.
    """
    preferred_files = ("model_visual.safetensors", "model.safetensors.index.json", "processor_config.json")
    found = [name for name in preferred_files if (directory / name).exists()]
    config = directory / "config.json"
    if config.is_file() and any(f'"{part}"' in config.read_text() for part in ("vision_config", "thinker_config")):
        found.append("the config.json of a whole model")
    if found:
        raise ValueError(f"directory: {directory} holds {', '.join(found)}; choose an empty one for the tower alone")


def load_tower(source: Path, *, impl: Impl, device: torch.device, dtype: torch.dtype | None) -> Tower:
    """Load a tower with all of its weights from a checkpoint.

    Args:
        source: the checkpoint's directory or `.safetensors` file.
        impl: `"reference"`, `"triton"` or `"auto"`, see `tower_class`.
        device: the device of the weights.
        dtype: the dtype of all weights; None for the checkpoint's most common dtype.

    Raises:
        CheckpointError: tensors are missing, unexpected or wrongly shaped; the message lists them all.
        ValueError: the tower cannot run on the device.
    """
    config = read_config(source)
    with torch.device("meta"):  # allocate no memory: the checkpoint's tensors replace the parameters
        tower = tower_class(impl, config, device)(config)
    expected = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    entries = find_tensors(source)
    tensors = load_tensors(
        entries, expected, family=config.family, dtype=dtype or checkpoint_dtype(entries), device=device
    )
    tower.load_state_dict(tensors, strict=True, assign=True)
    return tower


def save_tower(directory: Path, tower: Tower, dtype: torch.dtype, processors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a tower alone, under the official tensor names, with its config and the processors' configs.

    Args:
        directory: the directory to write to, made if missing.
        tower: the tower.
        dtype: the tower's dtype, for `config.json`.
        processors: content of the processors' configs by file name.

    Raises:
        ValueError: the directory has a whole checkpoint, see `refuse_whole_checkpoint`.
    """
    refuse_whole_checkpoint(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(directory / "model.safetensors", tower.state_dict(), family=tower.config.family)
    config = tower.config.to_hf() | {"dtype": str(dtype).removeprefix("torch.")}
    for name, content in {**processors, "config.json": config}.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
