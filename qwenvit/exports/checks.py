"""What receivers do not check: that embeddings fit their grids, their tower, the language model and the prompt."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig

if TYPE_CHECKING:
    from qwenvit.outputs import ItemEmbeddings

IDENTITY = ("family", "out_hidden_size", "depth", "hidden_size", "spatial_merge_size", "deepstack_visual_indexes")
"""Fields of a config that differ between published towers, and that every version of transformers writes."""


def check_items(items: Sequence["ItemEmbeddings"]) -> None:
    """Raise ValueError unless all items are whole, finite and of one tower."""
    if not items:
        raise ValueError("embeddings: expected at least one item, got none")
    for index, item in enumerate(items):
        if item is None:
            raise ValueError(f"item {index}: expected embeddings, got None, since encode skipped it")
        config = item.config
        if config != items[0].config:
            raise ValueError(f"item {index}: expected the tower of item 0, got the embeddings of another one")
        if len(item.deepstack) != (levels := len(config.deepstack_visual_indexes)):
            raise ValueError(f"item {index}: expected {levels} DeepStack features, got {len(item.deepstack)}")
        for name, layer in _layers(item):
            if layer.shape != (expected := (prod(item.grid), config.out_hidden_size)):
                grid = "x".join(map(str, item.grid))
                raise ValueError(
                    f"item {index}: expected {name} of shape {list(expected)} for its grid {grid}, "
                    f"got {list(layer.shape)}"
                )
            if not layer.is_floating_point() or layer.dtype != item.tokens.dtype:
                raise ValueError(
                    f"item {index}: expected {name} in one floating dtype with its tokens, got {layer.dtype}"
                )
            if not layer.isfinite().all():
                raise ValueError(f"item {index}: expected finite {name}, got NaN or infinity")


def _layers(item: "ItemEmbeddings") -> list[tuple[str, Tensor]]:
    return [("tokens", item.tokens), *((f"deepstack[{level}]", layer) for level, layer in enumerate(item.deepstack))]


def check_receiver(
    items: Sequence["ItemEmbeddings"], config: Any, input_ids: Tensor | Sequence[Any] | None = None
) -> None:
    """Raise ValueError unless a model takes these embeddings, and a prompt has a placeholder for each token."""
    check_items(items)
    top = _as_mapping(config)
    expected, got = VisionConfig.from_hf(top), items[0].config
    for name in IDENTITY:
        if getattr(expected, name) != getattr(got, name):
            raise ValueError(
                f"config: expected the model of the embeddings' tower, {name}={getattr(got, name)}, "
                f"got {getattr(expected, name)}"
            )
    if input_ids is not None:
        thinker = top.get("thinker_config", top)
        for kind in ("image", "video"):
            token_id = thinker.get(f"{kind}_token_id", thinker.get(f"{kind}_token_index"))  # Qwen2.5-Omni: index
            if token_id is None:
                raise ValueError(f"config: expected a whole model's config with {kind}_token_id, got none")
            _check_placeholders(items, kind, token_id, input_ids)


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not hasattr(config, "to_dict"):
        raise TypeError(f"config: expected a transformers config or its dict, got {type(config).__name__}")
    found: Mapping[str, Any] = config.to_dict()
    return found


def _check_placeholders(
    items: Sequence["ItemEmbeddings"], kind: str, token_id: int, input_ids: Tensor | Sequence[Any]
) -> None:
    """Raise ValueError unless the runs of a placeholder are as long as the items of a kind, in order.

    A run may be a part of an item: timestamps separate the frame groups of Qwen3-VL's videos.
    """
    runs = iter(_runs(input_ids, token_id))
    for index, item in enumerate(items):
        if item.is_video != (kind == "video"):
            continue
        found = 0
        while found < prod(item.grid) and (run := next(runs, 0)):
            found += run
        if found != prod(item.grid):
            raise ValueError(
                f"item {index}: expected {prod(item.grid)} placeholders of the {kind} (token {token_id}) in input_ids "
                f"for its grid {'x'.join(map(str, item.grid))}, got {found}; were both made of the same picture sizes?"
            )
    if left := sum(runs):
        raise ValueError(f"input_ids: expected no more {kind} placeholders (token {token_id}), got {left} without item")


def _runs(input_ids: Tensor | Sequence[Any], token_id: int) -> list[int]:
    """Return the lengths of the runs of a token, row by row."""
    ids = torch.atleast_2d(torch.as_tensor(input_ids, device="cpu"))
    ends = torch.nn.functional.pad((ids == token_id).int(), (1, 1)).diff().flatten().nonzero().flatten().tolist()
    return [stop - start for start, stop in list(pairwise(ends))[::2]]
