"""Embeddings as SGLang 0.5.23 takes them.

SGLang has two formats for them. In `"precomputed_embedding"` they become the item's `feature`, which models give to
their vision tower; only Qwen2.5-VL's returns images that are embedded already. In `"processor_output"` the field
`precomputed_embeddings` bypasses the tower, in every family and for videos too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenvit.exports.checks import check_items
from qwenvit.exports.fields import grids, joined, times

if TYPE_CHECKING:
    from qwenvit.outputs import ItemEmbeddings


def to_sglang(items: Sequence["ItemEmbeddings"]) -> dict[str, list[dict[str, Any]]]:
    """Return the arguments of `Engine.generate`: all images in one dict, all videos in another."""
    check_items(items)
    data: dict[str, list[dict[str, Any]]] = {}
    for kind, is_video in (("image", False), ("video", True)):
        if chosen := [item for item in items if item.is_video == is_video]:
            fields: dict[str, Any] = {"format": "processor_output", "modality": kind.upper()}
            fields |= {"precomputed_embeddings": joined(chosen), f"{kind}_grid_thw": grids(chosen)}
            data[f"{kind}_data"] = [fields]
    if "video_data" in data and items[0].config.traits.video_times == "positions":
        seconds = [one.second_per_grid for one in times([item for item in items if item.is_video])]
        for (fields,) in data.values():  # SGLang reads it from the first dict, whichever kind that is
            fields["second_per_grid_ts"] = seconds
    return data
