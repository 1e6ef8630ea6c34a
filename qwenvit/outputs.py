"""What the towers and the encoder return."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast, overload

import torch
from torch import Tensor


@dataclass(frozen=True)
class TowerOutput:
    """Features of a packed batch, as transformers' towers return them."""

    last_hidden_state: Tensor
    """`[patches, hidden_size]` after the last block, in the tower's order: window order for Qwen2.5-VL."""
    pooler_output: Tensor
    """`[tokens, out_hidden_size]`, merged tokens in reading order: the language model's input."""
    deepstack_features: list[Tensor]
    """`[tokens, out_hidden_size]` for each DeepStack block, shallowest first; empty without DeepStack."""


@dataclass(frozen=True)
class ItemEmbeddings:
    """Embeddings of one image or video."""

    tokens: Tensor
    """`[tokens, out_hidden_size]`: frame groups one after another, reading order within each."""
    deepstack: list[Tensor]
    """`[tokens, out_hidden_size]` for each DeepStack block; empty where the family has none."""
    grid: tuple[int, int, int]
    """Frame groups, rows and columns of merged tokens."""
    is_video: bool = False
    """Whether the input was a video, even one of a single frame group."""

    def spatial(self) -> Tensor:
        """Return the tokens as `[h, w, out_hidden_size]` of an image or `[t, h, w, out_hidden_size]` of a video."""
        return self.tokens.unflatten(0, self.grid if self.is_video else self.grid[1:])


class Embeddings(Sequence[ItemEmbeddings]):
    """Embeddings of a batch: a sequence with one entry per input, and the packed tensors they are views of.

    The entry of an input that was skipped (`on_error="skip"`) is None; the packed tensors have nothing of it.

    Attributes:
        packed: `[tokens, out_hidden_size]`, all items one after another, as transformers returns them.
        grid_thw: `[items, 3]` int64 on the CPU: frame groups, rows and columns of *patches*.
        deepstack: packed `[tokens, out_hidden_size]` for each DeepStack block.
    """

    def __init__(
        self,
        packed: Tensor,
        grid_thw: Tensor,
        deepstack: list[Tensor],
        spatial_merge_size: int,
        *,
        video: bool = False,
        skipped: Sequence[int] = (),
    ) -> None:
        self.packed = packed
        self.grid_thw = grid_thw
        self.deepstack = deepstack
        grids = grid_thw.clone()
        grids[:, 1:] //= spatial_merge_size
        sizes = grids.prod(dim=1).tolist()
        layers = [layer.split(sizes) for layer in deepstack]
        self._items = [
            ItemEmbeddings(tokens, [layer[i] for layer in layers], (frames, rows, columns), video)
            for i, (tokens, (frames, rows, columns)) in enumerate(zip(packed.split(sizes), grids.tolist(), strict=True))
        ]
        for position in skipped:
            self._items.insert(position, cast(ItemEmbeddings, None))  # only callers who ask for it get None

    @classmethod
    def concatenate(cls, parts: Sequence["Embeddings"], spatial_merge_size: int) -> "Embeddings":
        """Return the embeddings of all batches as those of one; batches of which every input was skipped have none."""
        skipped, start = [], 0
        for part in parts:
            skipped += [start + position for position, item in enumerate(part) if item is None]
            start += len(part)
        whole = [part for part in parts if len(part.grid_thw)] or parts
        layers = zip(*([part.packed, *part.deepstack] for part in whole), strict=True)
        packed, *deepstack = (layer[0] if len(layer) == 1 else torch.cat(layer) for layer in layers)
        grids = torch.cat([part.grid_thw for part in whole])
        return cls(packed, grids, deepstack, spatial_merge_size, skipped=skipped)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> ItemEmbeddings: ...
    @overload
    def __getitem__(self, index: slice) -> list[ItemEmbeddings]: ...
    def __getitem__(self, index: int | slice) -> ItemEmbeddings | list[ItemEmbeddings]:
        return self._items[index]

    def __iter__(self) -> Iterator[ItemEmbeddings]:
        return iter(self._items)

    def __repr__(self) -> str:
        grids = ", ".join("x".join(map(str, item.grid)) if item else "skipped" for item in self._items[:8])
        more = ", …" if len(self) > 8 else ""
        return f"Embeddings({len(self)} items, token grids {grids}{more}; packed {list(self.packed.shape)})"
