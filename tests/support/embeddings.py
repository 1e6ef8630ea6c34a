"""Embeddings of random numbers."""

from collections.abc import Sequence
from typing import Any

import torch

from qwenvit.config.vision_config import VisionConfig
from qwenvit.outputs import Embeddings
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
