"""Load and save towers: read a checkpoint's config, load its weights, write a tower alone."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from qwenvit.arguments import Impl
from qwenvit.config.families import FAMILIES, UnknownModelType
from qwenvit.config.hf_config import unstated_choices
from qwenvit.config.nesting import find_vision_config
from qwenvit.config.vision_config import VisionConfig
from qwenvit.towers.choose import Tower, tower_class
from qwenvit.towers.locate import directory_of
from qwenvit.towers.shapes import weight_shapes
from qwenvit.weights.adapters.adapter import (
    Adapter,
    adapter_alone_error,
    adapter_beside,
    adapter_in_checkpoint,
    is_adapter_alone,
    read_adapter,
    split_unmerged,
)
from qwenvit.weights.adapters.config import ADAPTER_CONFIG
from qwenvit.weights.header import TensorEntry
from qwenvit.weights.local import check_entries, checkpoint_dtype, find_tensors, load_tensors
from qwenvit.weights.recognise import find_tower, refuse_incomplete
from qwenvit.weights.save import save_tensors
from qwenvit.weights.strict_json import read_json

CONFIG = "config.json"
ConfigSource = str | os.PathLike[str] | Mapping[str, Any] | VisionConfig


def read_config(
    source: Path, *, config: ConfigSource | None = None, family: str | None = None, prefix: str | None = None
) -> VisionConfig:
    """Read the tower's config from the `config.json` of a checkpoint.

    Args:
        source: the checkpoint's directory, or its `.safetensors` file, which `config.json` is beside.
        config: what to read instead: another JSON file, the folder of a `config.json`, or such a file's content.
        family: the tower's family, whatever `model_type` says. None: that of `model_type`; if that is unknown, the
            family whose modules the checkpoint's tensors are, if the config states what tensors do not tell.
        prefix: the tower's prefix in a checkpoint with several.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: `config.json` is not JSON, or describes no tower of a known family.
    """
    if isinstance(config, VisionConfig):
        if family not in (None, config.family):
            raise ValueError(f"family: expected {config.family!r}, the family of config, got {family!r}")
        return config
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    where, content = _config_content(source, config)
    try:
        if family is None:
            try:
                return VisionConfig.from_hf(content)
            except UnknownModelType as unknown:
                family = _family_of_tensors(source, prefix, unknown)
                if left_out := unstated_choices(content, family):
                    raise ValueError(
                        f"{unknown}; the tensors are a {family} tower's, but do not tell {', '.join(left_out)}, which "
                        f"the config leaves out: family={family!r} takes transformers' defaults, config= states them"
                    ) from unknown
        return VisionConfig.from_hf(content, family=family)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if where == "config" else f"{where}: {error}") from error


def _config_content(
    source: Path, config: str | os.PathLike[str] | Mapping[str, Any] | None
) -> tuple[str, Mapping[str, Any]]:
    """Return the content of a config.json, and how an error names it."""
    if isinstance(config, Mapping):
        return "config", config
    if config is None:
        path = directory_of(source) / CONFIG
        if not path.is_file():
            raise FileNotFoundError(
                f"no config.json in {path.parent}: it tells which tower the weights are for; if you know, pass it as "
                "config= (a file, its folder or its content)"
            )
    elif isinstance(config, str | os.PathLike):
        path = Path(config).expanduser()
        if not os.path.exists(path):  # also false for a text that no path can be
            raise FileNotFoundError(
                f"config: expected an existing file or folder, a mapping or a VisionConfig, got {str(config)[:200]!r}"
            )
        path = path / CONFIG if path.is_dir() else path
    else:
        raise TypeError(f"config: expected a path, a mapping or a VisionConfig, got {type(config).__name__}")
    return str(path), read_json(path)


def _family_of_tensors(source: Path, prefix: str | None, unknown: UnknownModelType) -> str:
    """Return the family whose modules the checkpoint's tensors are."""
    try:
        tower = find_tower(find_tensors(source, prefix))
        refuse_incomplete(tower)
    except (OSError, ValueError) as error:
        raise ValueError(f"{unknown}; nor do its tensors tell the family, to be passed as family=: {error}") from error
    return tower.families[0]


def refuse_whole_checkpoint(directory: Path) -> None:
    """Refuse to write a tower into a directory with a whole checkpoint.

    The tower would overwrite the checkpoint's files, or loading would prefer these to the tower's. Or an adapter beside
    it, which may be merged already, would be merged again.

    Raises:
        ValueError: the directory has such files, which the message lists.
    """
    preferred_files = (
        "model_visual.safetensors", "model.safetensors.index.json", "processor_config.json", ADAPTER_CONFIG
    )  # fmt: skip
    found = [name for name in preferred_files if (directory / name).exists()]
    config = directory / CONFIG
    if config.is_file() and not _is_of_tower_alone(config):
        found.append("the config.json of a whole model")
    if found:
        raise ValueError(f"directory: {directory} contains {', '.join(found)}; choose an empty one for the tower alone")


def _is_of_tower_alone(config: Path) -> bool:
    """Return whether a config.json is a vision config itself, and not that of a model that contains one."""
    try:
        return not find_vision_config(read_json(config)).parents
    except (OSError, ValueError):
        return False


def load_tower(
    source: Path,
    *,
    impl: Impl,
    device: torch.device,
    dtype: torch.dtype | None,
    config: ConfigSource | None = None,
    family: str | None = None,
    prefix: str | None = None,
    adapter: Path | Literal[False] | None = None,
) -> Tower:
    """Load a tower with all of its weights from a checkpoint.

    Args:
        source: the checkpoint's directory or `.safetensors` file.
        impl: `"reference"`, `"triton"` or `"auto"`, see `tower_class`.
        device: the device of the weights.
        dtype: the dtype of all weights; None for the checkpoint's most common dtype.
        config: the tower's config, see `read_config`.
        family: the tower's family, see `read_config`.
        prefix: the tower's prefix in a checkpoint with several.
        adapter: the folder or file of a LoRA adapter to merge. None: the one beside the checkpoint or in it, if there
            is one. False: none.

    Raises:
        CheckpointError: tensors are missing, unexpected or wrongly shaped; its attributes list them all.
        ValueError: the tower cannot run on the device; the config or the adapter does not fit.
    """
    directory = directory_of(source)
    if source.is_dir() and is_adapter_alone(source):
        raise adapter_alone_error(source)
    tensors_found = find_tensors(source, prefix)  # first: a format that is not read often comes without a config.json
    vision = read_config(source, config=config, family=family, prefix=prefix)
    entries, merged = _with_adapter(directory, tensors_found, adapter)
    # Hold the config against the header before a tower of its sizes is built.
    expected = weight_shapes(vision)
    check_entries(entries, expected, vision.family)
    if merged is not None:
        merged.check(expected, vision.family)
    with torch.device("meta"):  # allocate no memory: the checkpoint's tensors replace the parameters
        tower = tower_class(impl, vision, device)(vision)
    tensors = load_tensors(
        entries, expected, family=vision.family, dtype=dtype or checkpoint_dtype(entries), device=device
    )
    if merged is not None:
        merged.merge(tensors, vision.family)
    tower.load_state_dict(tensors, strict=True, assign=True)
    return tower


def _with_adapter(
    directory: Path, entries: Mapping[str, TensorEntry], adapter: Path | Literal[False] | None
) -> tuple[dict[str, TensorEntry], Adapter | None]:
    """Return the base's tensors among `entries`, and the adapter to merge into them."""
    base, unmerged = split_unmerged(entries)
    own = {name: entries[name] for name in base.values()}
    beside = adapter_beside(directory)
    if adapter is False:
        return own, None
    if unmerged:
        if adapter is not None:
            raise ValueError(
                f"adapter: expected None or False, since the checkpoint in {directory} has an adapter of its own, "
                f"unmerged ({unmerged[0]}, ...), got {str(adapter)!r}"
            )
        return own, adapter_in_checkpoint(directory, entries)
    if adapter is None:
        found = None if beside is None else read_adapter(beside)
        if found is not None and found.tower_tensors:
            warnings.warn(
                f"{beside}: the LoRA adapter beside the checkpoint is merged into it; adapter=False if it is merged "
                "there already, adapter= this folder to merge it without this warning",
                stacklevel=5,
            )
    else:
        found = read_adapter(adapter)
        if beside is not None and beside.resolve() != directory_of(adapter).resolve():
            warnings.warn(f"{beside}: the adapter beside the checkpoint is not merged; {adapter} is", stacklevel=5)
    if found is not None:
        found.warn_if_irrelevant(stacklevel=5)
    return own, found if found is not None and found.tower_tensors else None


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
