"""What the towers and the encoder return."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig
from qwenvit.exports.exportable import Exportable
from qwenvit.exports.vllm import save_vllm_cache
from qwenvit.pooling import PoolMode, check_pool_mode, mean_of_items, normalized


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
class VideoTimes:
    """When the frames of a video are shown, which the prompts or positions of some language models state."""

    timestamps: tuple[float, ...]
    """Seconds from the start of the video for each frame group: the mean of its first and last frame."""
    second_per_grid: float
    """Seconds from one frame group to the next, as `qwenvit.rope_index` and transformers' processors name them."""

    @classmethod
    def of_frames(
        cls, frame_times: Sequence[float], num_frames: int, group: int, second_per_grid: float | None = None
    ) -> "VideoTimes":
        """Return the times of groups of frames; the last frame is repeated to fill its group.

        Args:
            frame_times: seconds from the start of the video for each frame, ascending.
            num_frames: the number of frames there are.
            group: frames of a group.
            second_per_grid: None: from the mean distance of the frames.

        Raises:
            ValueError: another number of times, or times that are not finite, not strictly ascending or below 0.
        """
        seconds = [float(second) for second in frame_times]
        if len(seconds) != num_frames:
            raise ValueError(f"frame_times: expected one for each of {num_frames} frames, got {len(seconds)}")
        if not all(map(math.isfinite, seconds)) or seconds != sorted(set(seconds)) or seconds[0] < 0:
            raise ValueError(f"frame_times: expected strictly ascending seconds from 0, got {seconds[:8]}")
        if second_per_grid is None:
            second_per_grid = group * (seconds[-1] - seconds[0]) / max(num_frames - 1, 1)
        last = [seconds[min(start + group, num_frames) - 1] for start in range(0, num_frames, group)]
        return cls(tuple((a + b) / 2 for a, b in zip(seconds[::group], last, strict=True)), second_per_grid)


@dataclass(frozen=True)
class ItemEmbeddings(Exportable):
    """Embeddings of one image or video."""

    tokens: Tensor
    """`[tokens, out_hidden_size]`: frame groups one after another, reading order within each."""
    deepstack: list[Tensor]
    """`[tokens, out_hidden_size]` for each DeepStack block; empty where the family has none."""
    grid: tuple[int, int, int]
    """Frame groups, rows and columns of merged tokens."""
    config: VisionConfig = field(repr=False)
    """The tower's config."""
    is_video: bool = False
    """Whether the input was a video, even one of a single frame group."""
    times: VideoTimes | None = None
    """When the frames of a video are shown; None for images, and for videos of which that is not known."""

    @property
    def grid_thw(self) -> Tensor:
        """`[1, 3]` int64 on the CPU: frame groups, rows and columns of *patches*."""
        frames, rows, columns = self.grid
        merge_size = self.config.spatial_merge_size
        return torch.tensor([[frames, rows * merge_size, columns * merge_size]], device="cpu")

    def spatial(self) -> Tensor:
        """Return the tokens as `[h, w, out_hidden_size]` of an image or `[t, h, w, out_hidden_size]` of a video."""
        return self.tokens.unflatten(0, self.grid if self.is_video else self.grid[1:])

    def cpu(self) -> "ItemEmbeddings":
        """Return a copy on the CPU, which keeps nothing of the batch that this is a view of."""
        layers = (layer.detach().to("cpu", copy=True) for layer in (self.tokens, *self.deepstack))
        tokens, *deepstack = layers
        return replace(self, tokens=tokens, deepstack=deepstack)

    def save_vllm_cache(self, folder: str | os.PathLike[str], uuid: str) -> Path:
        """Write the embeddings where vLLM's `ECExampleConnector` reads them; written against vLLM 0.32.

        Args:
            folder: the connector's `shared_storage_path`.
            uuid: the item's entry in the prompt's `multi_modal_uuids`.

        Returns:
            The file, `folder/uuid/encoder_cache.safetensors`. It appears as a whole or not at all. Its tensor
            `ec_cache` is `[tokens, out_hidden_size · (1 + levels)]`, DeepStack joined to the tokens along the width.

        Raises:
            ValueError: a `uuid` that cannot name a folder; embeddings that other exporters refuse too.
            OSError: the file cannot be written.
        """
        return save_vllm_cache(self, folder, uuid)

    def _items_to_export(self) -> "list[ItemEmbeddings]":
        return [self]


class Embeddings(Exportable, Sequence[ItemEmbeddings]):
    """Embeddings of a batch: a sequence with one entry per input, and the packed tensors they are views of.

    The entry of an input that was skipped (`on_error="skip"`) is None; the packed tensors have nothing of it.

    Attributes:
        packed: `[tokens, out_hidden_size]`, all items one after another, as transformers returns them.
        grid_thw: `[items, 3]` int64 on the CPU: frame groups, rows and columns of *patches*.
        deepstack: packed `[tokens, out_hidden_size]` for each DeepStack block.
        config: the tower's config.
        errors: why an input was skipped, by its position.
        last_hidden_state: `[patches, hidden_size]` after the last block, in the tower's own order; None unless the
            encoder was called with `keep_patches=True`.
    """

    def __init__(
        self,
        packed: Tensor,
        grid_thw: Tensor,
        deepstack: list[Tensor],
        config: VisionConfig,
        *,
        video: bool = False,
        times: VideoTimes | None = None,
        skipped: Sequence[int] = (),
        errors: Mapping[int, Exception] | None = None,
        last_hidden_state: Tensor | None = None,
    ) -> None:
        self.packed = packed
        self.grid_thw = grid_thw
        self.deepstack = deepstack
        self.config = config
        self.errors = dict(errors or {})
        self.last_hidden_state = last_hidden_state
        grids = grid_thw.clone()
        grids[:, 1:] //= config.spatial_merge_size
        sizes = grids.prod(dim=1).tolist()
        layers = [layer.split(sizes) for layer in deepstack]
        self._items = [
            ItemEmbeddings(tokens, [layer[i] for layer in layers], (frames, rows, columns), config, video, times)
            for i, (tokens, (frames, rows, columns)) in enumerate(zip(packed.split(sizes), grids.tolist(), strict=True))
        ]
        for position in skipped:
            self._items.insert(position, cast(ItemEmbeddings, None))  # only callers who ask for it get None

    @classmethod
    def concatenate(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """Return the embeddings of one tower as one batch: of several calls, images and videos alike.

        Raises:
            ValueError: no parts, or parts of different towers.
        """
        if not parts or any(part.config != parts[0].config for part in parts):
            raise ValueError(f"parts: expected embeddings of one tower, got {len(parts)} parts")
        skipped: list[int] = []
        errors: dict[int, Exception] = {}
        start = 0
        for part in parts:
            skipped += [start + position for position, item in enumerate(part) if item is None]
            errors |= {start + position: error for position, error in part.errors.items()}
            start += len(part)
        whole = [part for part in parts if len(part.grid_thw)] or parts
        layers = zip(*([part.packed, *part.deepstack] for part in whole), strict=True)
        packed, *deepstack = (layer[0] if len(layer) == 1 else torch.cat(layer) for layer in layers)
        grids = torch.cat([part.grid_thw for part in whole])
        states = [part.last_hidden_state for part in whole if part.last_hidden_state is not None]
        patches = (states[0] if len(states) == 1 else torch.cat(states)) if len(states) == len(whole) else None
        extras: dict[str, Any] = {"skipped": skipped, "errors": errors, "last_hidden_state": patches}
        joined = cls(packed, grids, deepstack, parts[0].config, **extras)
        joined._items = [
            view and replace(view, is_video=item.is_video, times=item.times)
            for view, item in zip(joined._items, chain(*parts), strict=True)
        ]
        return joined

    def pooled(self, mode: PoolMode = "mean", *, normalize: bool = False) -> Tensor:
        """Return one vector for each image or video, computed on the device of the embeddings.

        Equal images have equal vectors and similar ones similar vectors: they serve to find near-duplicates, to group
        images and to train probes. They were not trained against text, so they do not rank images by a text query.
        Every bit of a vector depends on its item's embeddings alone.

        Args:
            mode: `"mean"` averages the merged tokens, which are in the language model's space; `"patches"` averages
                the patches after the last block, before the merger and its norm. They keep more of what the image
                looks like, and a few of their channels may be far larger than the rest.
            normalize: divide each vector by its length, so that dot products are cosines.

        Returns:
            `[items, out_hidden_size]`, or `[items, hidden_size]` of patches, float32. A skipped item has no row.

        Raises:
            ValueError: an unknown mode, or patches that were not kept: pass `keep_patches=True` to the encoder.
        """
        check_pool_mode(mode)
        rows, sizes = self.packed, self.grid_thw.prod(1)
        if mode == "mean":
            sizes = sizes // self.config.merge_unit
        elif self.last_hidden_state is None:
            raise ValueError("mode: 'patches' needs the last block's states: pass keep_patches=True to the encoder")
        else:
            rows = self.last_hidden_state
        vectors = mean_of_items(rows, sizes.tolist())
        return normalized(vectors) if normalize else vectors

    def _items_to_export(self) -> list[ItemEmbeddings]:
        return self._items

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
