"""Rivals of `qwenvit.rope_index`, transformers' `get_rope_index` and a numpy version, and the inputs they run on."""

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.torchvision_cpu import define_torchvision_schemas

define_torchvision_schemas()  # before transformers imports torchvision

MODEL_CLASSES = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl": "Qwen3VLModel",
    "qwen3_vl_moe": "Qwen3VLMoeModel",
    "qwen3_5": "Qwen3_5Model",
}
"""transformers' class with `get_rope_index`, by family."""
TIMESTAMP_FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5")
"""Families that put a text timestamp before each frame group of a video."""
SETUPS = {  # rows, tokens a row, images and videos of the batch, frame groups of a video
    "mixed": (2, 4096, 8, 2, 8),
    "batch": (4, 8192, 16, 4, 8),
    "video": (1, 16384, 0, 8, 16),
}


def processor_inputs(name: str, family: str, seed: int = 0, padding: str = "right") -> dict[str, Tensor]:
    """Return a set-up's inputs as a processor returns them: shuffled images and videos of many sizes.

    Vision tokens are about 85 % of a row. A few text tokens separate them, and timestamps separate the frame groups of
    TIMESTAMP_FAMILIES. The second half of a batch's rows is padded.
    """
    rows, length, images, videos, frames = SETUPS[name]
    rng = np.random.default_rng(seed)
    types = np.zeros((rows, length), np.int64)
    mask = np.ones((rows, length), np.int64)
    grids: dict[int, list[list[int]]] = {1: [], 2: []}
    items_per_row = {1: images // rows, 2: videos // rows}
    budget = int(0.85 * length) // (items_per_row[1] + 3 * items_per_row[2])  # a video gets three images' tokens
    for row in range(rows):
        at = 12
        for kind in rng.permutation([1] * items_per_row[1] + [2] * items_per_row[2]).tolist():
            t = frames if kind == 2 else 1
            area = budget * (3 if kind == 2 else 1) // t
            h = max(1, round(area**0.5 * rng.uniform(0.6, 1.0)))
            w = max(1, area // h)
            grids[kind].append([t, 2 * h, 2 * w])
            separate_frames = kind == 2 and family in TIMESTAMP_FAMILIES
            for _ in range(t if separate_frames else 1):
                size = h * w * (1 if separate_frames else t)
                types[row, at : at + size] = kind
                at += size + (7 if separate_frames else 3)
        at += 40
        if row >= rows / 2:
            mask[row, at:] = 0
            if padding == "left":
                types[row], mask[row] = (np.roll(array[row], length - at) for array in (types, mask))
    ids = rng.integers(1000, 100_000, (rows, length))
    for kind in grids:
        ids[types == kind] = vision_ids(family)[kind - 1]
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "mm_token_type_ids": torch.from_numpy(types),
        "attention_mask": torch.from_numpy(mask),
    }
    for key, kind in (("image_grid_thw", 1), ("video_grid_thw", 2)):
        if grids[kind]:
            inputs[key] = torch.tensor(grids[kind])
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.ones(len(grids[2]))  # whole seconds: transformers 5.17 truncates others
    return inputs


def vision_ids(family: str) -> tuple[int, int]:
    """Return the published ids of image and video tokens."""
    return (248056, 248057) if family == "qwen3_5" else (151655, 151656)


@functools.cache
def model_class(family: str) -> Any:
    """Return transformers' class that has the family's `get_rope_index`."""
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), MODEL_CLASSES[family])


def transformers_rope_index(
    family: str,
    *,
    input_ids: Tensor | None = None,
    mm_token_type_ids: Tensor,
    merge: int = 2,
    tokens_per_second: int = 2,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """Return positions `[3, rows, tokens]` and deltas `[rows, 1]` from transformers' `get_rope_index`.

    The method runs on a stand-in for its model with the only attributes that it reads.
    """
    model = model_class(family)
    vision_config = SimpleNamespace(spatial_merge_size=merge, tokens_per_second=tokens_per_second)
    stand_in = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision_config),
        get_vision_position_ids=functools.partial(model.get_vision_position_ids, None),
    )
    input_ids = mm_token_type_ids if input_ids is None else input_ids  # it reads their shape and dtype alone
    return model.get_rope_index(stand_in, input_ids=input_ids, mm_token_type_ids=mm_token_type_ids, **inputs)


def numpy_rope_index(
    family: str, inputs: dict[str, Tensor], merge: int = 2, tokens_per_second: int = 2
) -> tuple[Tensor, Tensor]:
    """Return the positions and deltas of `transformers_rope_index`, computed on the host.

    One copy brings all inputs to the host, numpy walks the runs of equal token types, and the results are copied back.
    """
    types = inputs["mm_token_type_ids"]
    device = types.device
    keys = [key for key in ("mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw") if key in inputs]
    if device.type == "cpu":
        host = {key: inputs[key].numpy() for key in keys}
    else:
        pulled = torch.cat([inputs[key].reshape(-1) for key in keys]).cpu()
        parts = pulled.split([inputs[key].numel() for key in keys])
        host = {key: part.view(inputs[key].shape).numpy() for key, part in zip(keys, parts, strict=True)}
    grids: dict[int, Any] = {1: host.get("image_grid_thw", []), 2: host.get("video_grid_thw", [])}
    if family in TIMESTAMP_FAMILIES:
        grids[2] = [[1, h, w] for t, h, w in grids[2] for _ in range(t)]
    grids = {kind: iter([(int(t), int(h), int(w)) for t, h, w in items]) for kind, items in grids.items()}
    interval = tokens_per_second if family == "qwen2_5_vl" else 1  # every set-up has one second a frame group
    positions = np.zeros((3, *host["mm_token_type_ids"].shape), np.int64)
    deltas = np.empty((positions.shape[1], 1), np.int64)
    unpadded = host["attention_mask"].astype(bool)
    for row, row_types in enumerate(host["mm_token_type_ids"]):
        kinds = row_types[unpadded[row]]
        edges = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(kinds)]
        row_positions = np.empty((3, len(kinds)), np.int64)
        start = end = 0  # the first position of the next run, and one more than the largest position so far
        for first, last, kind in zip(edges, edges[1:], kinds[edges[:-1]].tolist(), strict=False):
            if kind == 0:
                row_positions[:, first:last] = np.arange(start, start + last - first)
                start += last - first
                end = max(end, start)
                continue
            t, h, w = next(grids[kind])
            h, w = h // merge, w // merge
            time = np.arange(t) * (interval if kind == 2 else 1) + start
            side = np.arange(start, start + max(h, w))
            row_positions[0, first:last].reshape(t, h * w)[:] = time[:, None]
            row_positions[1, first:last].reshape(t, h, w)[:] = side[:h, None]
            row_positions[2, first:last].reshape(t * h, w)[:] = side[:w]
            start += max(h, w)
            end = max(end, start, int(time[-1]) + 1)
        positions[:, row, unpadded[row]] = row_positions
        deltas[row] = end - len(kinds)
    on_device = [torch.from_numpy(array).to(device, non_blocking=True) for array in (positions, deltas)]
    return on_device[0], on_device[1]
