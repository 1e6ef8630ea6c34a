"""Choosing frames of a clip by the sampling rules of Qwen2's and Qwen3's video processors."""

import math
from typing import Literal

import numpy as np
import torch

from qwenvit.config.families import FAMILIES

VideoRule = Literal["qwen2_vl", "qwen3_vl"]
"""Whose video processor: `Qwen2VLVideoProcessor` or `Qwen3VLVideoProcessor`."""
DEFAULT_TARGET_FPS = 2
"""Frames per second to take: of transformers' `Qwen3VLVideoProcessor`, and for Qwen2 of Qwen's `qwen_vl_utils`."""
NUMBERS = (int, float, np.integer, np.floating)


def video_rule(family: str) -> VideoRule:
    """Return which of transformers' two video processors a family uses; Qwen3-Omni uses Qwen2's.

    Raises:
        ValueError: unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {family!r}")
    return "qwen3_vl" if family in ("qwen3_vl", "qwen3_5") else "qwen2_vl"


def sample_frames(
    total_frames: int,
    fps: float | None,
    *,
    family: str,
    target_fps: float | None = None,
    num_frames: int | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> list[int]:
    """Return which frames of a clip a family's video processor samples, spread evenly over the clip.

    Args:
        total_frames: frames of the clip. This and the other counts may be whole floats, as OpenCV returns them.
        fps: frames per second of the clip. None where it is not known: Qwen3's rule then assumes 24, Qwen2's requires
            `num_frames`.
        family: the family whose rule to use. Qwen2's rule divides the clip into an even number of equal parts and takes
            the first frame of each; Qwen3's takes the first frame, the last and evenly spaced ones between, rounded.
        target_fps: frames per second to take; 2 unless `num_frames` is given.
        num_frames: frames to take in all.
        min_frames: with `target_fps`, take at least this many, if the clip has them.
        max_frames: with `target_fps`, take at most this many.

    Returns:
        Indices from 0, ascending.

    Raises:
        ValueError: an unknown family, a number that is not positive, both `target_fps` and `num_frames`, an unknown
            `fps` that Qwen2's rule needs, more frames than the clip has, or too few for one group.

    Source: `sample_frames` of transformers 5.23's `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`.
    """
    if target_fps is not None and num_frames is not None:
        raise ValueError(f"target_fps: expected only one of target_fps={target_fps} and num_frames={num_frames}")
    rule = video_rule(family)
    total_frames = _whole("total_frames", total_frames)
    min_frames = _whole("min_frames", min_frames)
    max_frames = _whole("max_frames", max_frames)
    num_frames = None if num_frames is None else _whole("num_frames", num_frames)
    target_fps = _positive("target_fps", DEFAULT_TARGET_FPS if target_fps is None else target_fps)
    if fps is None:
        if rule == "qwen2_vl" and num_frames is None:
            raise ValueError("fps: expected the clip's frames per second, got None; pass it, or num_frames")
        fps = 24
    fps = _positive("fps", fps)

    if num_frames is not None:
        count = num_frames if rule == "qwen3_vl" else round(num_frames / 2) * 2
    elif rule == "qwen3_vl":
        count = min(max(int(total_frames / fps * target_fps), min_frames), max_frames, total_frames)
    else:
        even_max_frames = min(max_frames, total_frames) // 2 * 2
        count = math.floor(min(max(total_frames / fps * target_fps, min_frames), even_max_frames, total_frames) / 2) * 2
    if (most := max(count, num_frames or 0)) > total_frames:  # an odd number may be rounded down to what the clip has
        raise ValueError(f"num_frames: expected at most total_frames={total_frames}, got {most}")
    if count < 1:
        raise ValueError(
            f"total_frames: expected enough for a pair of frames, got {total_frames} (num_frames={num_frames})"
        )
    if rule == "qwen3_vl":
        return [int(index) for index in np.linspace(0, total_frames - 1, count).round()]
    starts = torch.arange(0, total_frames, total_frames / count, dtype=torch.float32, device="cpu").int()
    return [int(index) for index in starts[:count]]  # rounding may add an index past the end; transformers fails there


def _whole(name: str, count: float) -> int:
    """Return a count as an int, also one that is a NumPy integer or a whole float."""
    if not isinstance(count, NUMBERS) or isinstance(count, bool) or not 1 <= count < math.inf or count != int(count):
        raise ValueError(f"{name}: expected a positive integer, got {count!r}")
    return int(count)


def _positive(name: str, value: float) -> float:
    """Return a rate as a float, also one that is a NumPy number."""
    if not isinstance(value, NUMBERS) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return float(value)
