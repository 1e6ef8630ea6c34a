"""What a shard is made of: encoded items, and how they are laid out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig
from qwenvit.datasets.record import Record
from qwenvit.outputs import VideoTimes


@dataclass(frozen=True)
class EncodedItem:
    """One image or video on its way into a shard. Its tensors are on the CPU, and views of those of its batch."""

    record: Record
    grid: tuple[int, int, int]
    """Frame groups, rows and columns of merged tokens."""
    num_tokens: int
    tokens: Tensor | None
    """`[tokens, out_hidden_size]`, or None where the output has only vectors."""
    deepstack: list[Tensor]
    """`[tokens, out_hidden_size]` for each DeepStack block; empty without them, and where there are no tokens."""
    pooled: Tensor | None
    """`[width]` float32, or None."""
    is_video: bool
    times: VideoTimes | None

    @property
    def num_bytes(self) -> int:
        """The memory of the tensors."""
        tensors = (self.tokens, self.pooled, *self.deepstack)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class ShardLayout:
    """What the items of a shard have in common."""

    config: VisionConfig
    model: str
    """Where the tower came from."""
    dtype: torch.dtype
    """The dtype of the tokens."""
    has_tokens: bool
    has_pooled: bool
    metadata: dict[str, str]
    """The settings of the manifest, each as JSON, for the file's own header."""
