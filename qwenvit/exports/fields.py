"""What vLLM and SGLang take alike: DeepStack joined to the tokens, grids of patches, times of videos."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qwenvit.outputs import ItemEmbeddings, VideoTimes


def joined(items: Sequence["ItemEmbeddings"]) -> Tensor:
    """Return `[tokens, out_hidden_size · (1 + levels)]` on the CPU: tokens and DeepStack side by side."""
    return torch.cat([torch.cat([item.tokens, *item.deepstack], dim=1) for item in items]).cpu()


def grids(items: Sequence["ItemEmbeddings"]) -> Tensor:
    """Return `[items, 3]` int64: frame groups, rows and columns of patches."""
    return torch.cat([item.grid_thw for item in items])


def times(items: Sequence["ItemEmbeddings"]) -> list["VideoTimes"]:
    """Return the times of videos.

    Raises:
        ValueError: a video without times.
    """
    found = []
    for index, item in enumerate(items):
        if item.times is None:
            raise ValueError(
                f"video {index}: expected times, which this language model needs, got None; "
                "encode a video file, or pass frame_times to encode_video"
            )
        found.append(item.times)
    return found
