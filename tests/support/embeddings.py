"""Embeddings of random numbers, and files of embeddings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qwenvit.config.vision_config import VisionConfig
from qwenvit.datasets.formats import open_writer
from qwenvit.datasets.item import EncodedItem, ShardLayout
from qwenvit.datasets.record import Record, WholeFile
from qwenvit.outputs import Embeddings, ItemEmbeddings
from support.towers import SMALL


def embeddings(
    grids: Sequence[tuple[int, int, int]] = ((1, 4, 6), (1, 8, 4)),
    config: VisionConfig = SMALL["qwen3_vl"],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Embeddings:
    """Return embeddings of items of grids in patches.

    Args:
        grids: frame groups, rows and columns of each item.
        config: the tower's config.
        dtype: of tokens and DeepStack features.
        options: video, times and skipped, of `Embeddings`.
    """
    tokens = sum(t * h * w for t, h, w in grids) // config.merge_unit
    generator = torch.Generator().manual_seed(tokens)
    levels = len(config.deepstack_visual_indexes)
    layers = torch.randn(1 + levels, tokens, config.out_hidden_size, generator=generator).to(dtype)
    return Embeddings(layers[0], torch.tensor(grids), list(layers[1:]), config, **options)


def save_embeddings(path: Path, items: Mapping[str, ItemEmbeddings]) -> None:
    """Write embeddings by name to a file, as `qwenvit encode` does."""
    first = next(iter(items.values()))
    layout = ShardLayout(first.config, "somewhere", first.tokens.dtype, True, False, {})
    with path.open("w+b") as stream:
        writer = open_writer("safetensors", stream, layout)
        for name, item in items.items():
            record = Record(name, "", name, WholeFile(name), item.is_video)
            layers = (item.tokens, item.deepstack, None, item.is_video, item.times)
            writer.add(EncodedItem(record, item.grid, len(item.tokens), *layers))
        writer.finish()
