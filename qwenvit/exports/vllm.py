"""Embeddings as vLLM 0.32 takes them: prompts offline, content parts over HTTP, files of the encoder cache."""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwenvit.exports.checks import check_items
from qwenvit.exports.fields import grids, joined, times
from qwenvit.weights.save import write_safetensors

if TYPE_CHECKING:
    from qwenvit.outputs import ItemEmbeddings


def to_vllm(items: Sequence["ItemEmbeddings"]) -> dict[str, dict[str, Any]]:
    """Return `multi_modal_data` of a prompt: the fields of all images and of all videos."""
    check_items(items)
    images = [item for item in items if not item.is_video]
    videos = [item for item in items if item.is_video]
    data: dict[str, dict[str, Any]] = {}
    if images:
        data["image"] = {"image_embeds": joined(images), "image_grid_thw": grids(images)}
    if videos:
        data["video"] = {"video_embeds": joined(videos), "video_grid_thw": grids(videos)}
        data["video"] |= video_times(videos)
    return data


def video_times(videos: Sequence["ItemEmbeddings"]) -> dict[str, Any]:
    """Return the field by which a family's language model knows the times of videos."""
    match videos[0].config.traits.video_times:
        case "text":
            return {"timestamps": [list(one.timestamps) for one in times(videos)]}
        case "positions":
            return {"second_per_grid_ts": torch.tensor([one.second_per_grid for one in times(videos)])}
    return {}


def to_vllm_message(items: Sequence["ItemEmbeddings"]) -> list[dict[str, Any]]:
    """Return one content part for each item, its tensors in base64."""
    check_items(items)
    parts = []
    for item in items:
        ((kind, fields),) = to_vllm([item]).items()
        # A part's metadata are those of one item, without the axis of items. Times as tensors: vLLM decodes all alike.
        single = {key: value if key.endswith("_embeds") else torch.as_tensor(value[0]) for key, value in fields.items()}
        if "timestamps" in single:
            single["timestamps"] = torch.tensor(fields["timestamps"][0], dtype=torch.float64)
        part = {key: _base64(value) for key, value in single.items()}
        parts.append({"type": f"{kind}_embeds", f"{kind}_embeds": part})
    return parts


def _base64(tensor: Tensor) -> str:
    """Encode as `.npy` without pickle, or bf16, which numpy lacks, by `torch.save`; vLLM loads with `weights_only`."""
    buffer = io.BytesIO()
    if tensor.dtype == torch.bfloat16:
        torch.save(tensor, buffer)
    else:
        np.save(buffer, tensor.numpy(), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def save_vllm_cache(item: "ItemEmbeddings", folder: str | os.PathLike[str], uuid: str) -> Path:
    """Write the file of an item and return its path."""
    check_items([item])
    if not isinstance(uuid, str) or uuid in ("", ".", "..") or {"/", "\\", "\0"} & set(uuid):
        raise ValueError(f"uuid: expected the name of a folder, got {uuid!r}")
    path = Path(folder).expanduser() / uuid / "encoder_cache.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {"ec_cache": joined([item])}, {})
    return path
