"""Files of embeddings, as `qwenvit encode` writes them.

A safetensors file has `NAME/tokens` and `NAME/deepstack.K` for each image or video, and in its metadata, as JSON:
`grids`, the grid of tokens by name; `times`, the times of videos by name, null where unknown; `config`, the tower's
config; `model`, where the tower came from. In a file of one image, tensors have no `NAME/`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig
from qwenvit.outputs import ItemEmbeddings, VideoTimes
from qwenvit.weights.header import read_header
from qwenvit.weights.save import write_safetensors
from qwenvit.weights.strict_json import parse_json


def save_embeddings(path: Path, items: Mapping[str, ItemEmbeddings], model: str, *, prefixed: bool = True) -> None:
    """Write the embeddings of one tower, atomically.

    Args:
        path: the file; its folder exists.
        items: embeddings by name, at least one.
        model: where the tower came from.
        prefixed: whether names of tensors start with the item's; False for a file of one item.
    """
    tensors: dict[str, Tensor] = {}
    for name, item in items.items():
        layers = {"tokens": item.tokens} | {f"deepstack.{level}": layer for level, layer in enumerate(item.deepstack)}
        tensors |= {_key(name, key, prefixed): layer.cpu().contiguous() for key, layer in layers.items()}
    metadata = {
        "grids": {name: item.grid for name, item in items.items()},
        "times": {name: item.times and asdict(item.times) for name, item in items.items() if item.is_video},
        "config": next(iter(items.values())).config.to_hf(),
        "model": model,
    }
    write_safetensors(path, tensors, {key: json.dumps(value) for key, value in metadata.items()})


def load_embeddings(path: str | os.PathLike[str]) -> dict[str, ItemEmbeddings]:
    """Load the embeddings that `qwenvit encode` wrote.

    Args:
        path: the file, or the folder with a file for each image.

    Returns:
        The embeddings of each image by its name, on the CPU.

    Raises:
        ValueError: a file that `qwenvit encode` did not write, or a folder without any.
        OSError: a file cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return _load_file(path)
    items: dict[str, ItemEmbeddings] = {}
    for file in sorted(path.rglob("*.safetensors")):
        items |= _load_file(file)
    if not items:
        raise ValueError(f"path: expected a folder with files of embeddings, got none in {path}")
    return items


def _load_file(path: Path) -> dict[str, ItemEmbeddings]:
    try:
        read_header(path)  # opening a named pipe would never return
        with safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).items()
            described = {key: parse_json(value.encode(), key) for key, value in metadata if key != "format"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        grids, times = described["grids"], described["times"]
        config = VisionConfig.from_hf(described["config"])
        prefixed = "tokens" not in tensors
        levels = [f"deepstack.{level}" for level in range(len(config.deepstack_visual_indexes))]
        return {
            name: ItemEmbeddings(
                tensors[_key(name, "tokens", prefixed)],
                [tensors[_key(name, level, prefixed)] for level in levels],
                tuple(grid),
                config,
                name in times,
                times.get(name) and VideoTimes(tuple(times[name]["timestamps"]), times[name]["second_per_grid"]),
            )
            for name, grid in grids.items()
        }
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file of `qwenvit encode`, got {error!r}; encode again") from error


def _key(name: str, tensor: str, prefixed: bool) -> str:
    return f"{name}/{tensor}" if prefixed else tensor
