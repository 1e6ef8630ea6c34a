"""Reading the files of embeddings that `qwenvit encode` writes.

A safetensors file has `NAME/tokens` and `NAME/deepstack.K` for each image or video, and in its metadata, as JSON:
`grids`, the grid of tokens by name; `times`, the times of videos by name, null where unknown; `config`, the tower's
config; `model`, where the tower came from.
"""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qwenvit.config.vision_config import VisionConfig
from qwenvit.outputs import ItemEmbeddings, VideoTimes
from qwenvit.weights.header import read_header
from qwenvit.weights.strict_json import parse_json


def load_embeddings(path: str | os.PathLike[str]) -> dict[str, ItemEmbeddings]:
    """Load the embeddings that `qwenvit encode` wrote.

    Args:
        path: the file, or the folder with its shards.

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
        if tensors.keys() <= {"pooled", "padding"}:
            raise ValueError("vectors without tokens, `pooled`: read it with safetensors")
        levels = [f"deepstack.{level}" for level in range(len(config.deepstack_visual_indexes))]
        return {
            name: ItemEmbeddings(
                tensors[f"{name}/tokens"],
                [tensors[f"{name}/{level}"] for level in levels],
                tuple(grid),
                config,
                name in times,
                times.get(name) and VideoTimes(tuple(times[name]["timestamps"]), times[name]["second_per_grid"]),
            )
            for name, grid in grids.items()
        }
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file of `qwenvit encode`, got {error!r}; encode again") from error
