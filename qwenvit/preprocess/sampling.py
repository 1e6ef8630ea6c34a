"""Which frames of a clip to look at: the sampling rules of Qwen2's and Qwen3's video processors."""

import math
from typing import Literal

import numpy as np
import torch

from qwenvit.config.families import FAMILIES

Rule = Literal["qwen2_vl", "qwen3_vl"]


def rule_of(family: str) -> Rule:
    """Which of transformers' two video processors a family has; Qwen3-Omni has Qwen2's.

    Raises:
        ValueError: unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {family!r}")
    return "qwen3_vl" if family in ("qwen3_vl", "qwen3_5") else "qwen2_vl"


def sample_frames(
    total_frames: int,
    fps: float,
    *,
    family: str,
    target_fps: float | None = None,
    num_frames: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> list[int]:
    """Which frames of a clip a family's processor takes, evenly spread over it.

    Args:
        total_frames: frames of the clip.
        fps: frames a second of the clip.
        family: whose rule. Qwen2's take an even number of frames, each at the start of its share of the clip; Qwen3's
            take the first and the last frame and round the others' places in between.
        target_fps: frames a second to take, 2 unless `num_frames` says how many.
        num_frames: how many frames to take in all.
        min_frames: take at least so many, if the clip has them.
        max_frames: take at most so many.

    Returns:
        Indices from 0, in order.

    Raises:
        ValueError: numbers that are not positive, both `target_fps` and `num_frames`, more frames than the clip has,
            or too few of them for one group.

    Source: `sample_frames` of transformers 5.23's `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`.
    """
    if target_fps is not None and num_frames is not None:
        raise ValueError(f"target_fps: expected only one of target_fps={target_fps} and num_frames={num_frames}")
    rule = rule_of(family)
    rate = 2 if target_fps is None else target_fps
    given = {"total_frames": total_frames, "min_frames": min_frames, "max_frames": max_frames}
    given |= {"num_frames": 1 if num_frames is None else num_frames}
    for name, count in given.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name}: expected a positive integer, got {count!r}")
    for name, value in (("fps", fps), ("target_fps", rate)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")

    if num_frames is not None:
        count = num_frames if rule == "qwen3_vl" else round(num_frames / 2) * 2
    elif rule == "qwen3_vl":
        count = min(max(int(total_frames / fps * rate), min_frames), max_frames, total_frames)
    else:
        most = min(max_frames, total_frames) // 2 * 2
        count = math.floor(min(max(total_frames / fps * rate, min_frames), most, total_frames) / 2) * 2
    if count > total_frames:
        raise ValueError(f"num_frames: expected at most total_frames={total_frames}, got {count}")
    if count < 1:
        raise ValueError(
            f"total_frames: expected enough for a pair of frames, got {total_frames} (num_frames={num_frames})"
        )
    if rule == "qwen3_vl":
        return [int(index) for index in np.linspace(0, total_frames - 1, count).round()]
    starts = torch.arange(0, total_frames, total_frames / count).int()
    return [int(index) for index in starts[:count]]  # rounding may add one past the end, where transformers fails
