"""M-RoPE positions: the time, height and width of each token of a text-and-vision sequence."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenvit import ops
from qwenvit.config.vision_config import VisionConfig
from qwenvit.mrope.rules import HFConfig, MRopeRules, resolve_rules
from qwenvit.ops.mrope_host import IMAGE, VIDEO, SecondPerGridTs, check_values

SECOND_PER_GRID_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Floating dtypes of `second_per_grid_ts`; integers are accepted too."""


def rope_index(
    *,
    input_ids: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: SecondPerGridTs | None = None,
    attention_mask: Tensor | None = None,
    family: str | VisionConfig | HFConfig | Mapping[str, Any],
    tokens_per_second: int | None = None,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    spatial_merge_size: int | None = None,
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each token's positions on the three axes of M-RoPE, as transformers' `get_rope_index` does.

    A text token advances all three axes by one position. An image or video starts at the position that the next text
    token would have had; each of its tokens adds its frame group, row and column to that start, and whatever follows
    starts after the longer of its height and width. In families whose videos have timestamps, each frame group of a
    video starts like an image of its own. With `second_per_grid_ts`, frame group `i` of a video adds
    `i * (tokens_per_second * second_per_grid_ts)` to the temporal position instead of `i`, computed in the dtype given
    (float32 for a sequence) and truncated to an integer. Masked tokens are skipped and get position 0. Images that
    touch (no text between them) are separated by their grids; transformers refuses those.

    On a CUDA device nothing is read back: the call does not synchronise, and a CUDA graph can capture it if
    `second_per_grid_ts` is a CUDA tensor or None. On other devices the CPU computes the positions.

    Args:
        input_ids: `[B, S]` integer token ids; they mark vision tokens if `mm_token_type_ids` is None.
        mm_token_type_ids: `[B, S]` integers, 0 for text, 1 for image, 2 for video tokens, as processors return them.
        image_grid_thw: `[images, 3]` integers: frame groups, rows and columns of patches, in order of appearance.
        video_grid_thw: `[videos, 3]` integers: frame groups, rows and columns of patches, in order of appearance.
        second_per_grid_ts: `[videos]` seconds between frame groups, for `qwen2_5_vl` alone; None means 1 each.
        attention_mask: `[B, S]`, nonzero (True) for each token that counts, with padding anywhere; None if all count.
        family: `"qwen2_vl"`, `"qwen2_5_vl"`, `"qwen3_vl"` or `"qwen3_5"` (3.5 and later); or a VisionConfig, a
            transformers config or its dict, whose values override the family's published ones.
        tokens_per_second: temporal positions per second, for `qwen2_5_vl` alone.
        image_token_id: the id that marks image tokens in `input_ids`.
        video_token_id: the id that marks video tokens in `input_ids`.
        spatial_merge_size: patches merged into one token along each side; 2 unless a config says otherwise.
        validate: whether to check values. On the CPU they are always checked. On a CUDA device None and False skip the
            check, and True synchronises. Unchecked grids that do not match the tokens give meaningless positions
            (vision tokens past the last grid all get the position that follows it), but no write outside the result.

    Returns:
        `position_ids`, `[3, B, S]` int64 (temporal, height, width), and `deltas`, `[B, 1]` int64: each row's greatest
        position plus one, minus the number of its unmasked tokens (0 for a row without any). Both are on the device of
        the inputs.

    Raises:
        TypeError: an argument is not a tensor, or `family` is neither a name nor a config.
        ValueError: a shape, dtype or device is wrong, a family without a time scale is given one, or (if values are
            checked) a token type is not 0, 1 or 2, a value is out of range, or the grids do not match the tokens.
    """
    rules = resolve_rules(family, tokens_per_second, image_token_id, video_token_id, spatial_merge_size)
    if input_ids is not None:
        _check_tokens("input_ids", input_ids)
    if mm_token_type_ids is not None:
        _check_tokens("mm_token_type_ids", mm_token_type_ids)
        if input_ids is not None:
            _check_tensor("mm_token_type_ids", mm_token_type_ids, input_ids.shape, input_ids.device)
        tokens, image_token, video_token = mm_token_type_ids, IMAGE, VIDEO
    elif input_ids is not None:
        tokens, image_token, video_token = input_ids, rules.image_token_id, rules.video_token_id
    else:
        raise ValueError("input_ids: expected input_ids or mm_token_type_ids, got neither")
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask, tokens.shape, tokens.device)
        if attention_mask.is_complex():
            raise ValueError(f"attention_mask: expected a real dtype, got {attention_mask.dtype}")
    for name, grid in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw)):
        if grid is not None:
            _check_tensor(name, grid, (*getattr(grid, "shape", ())[:1], 3), tokens.device)
            if not _is_integer(grid):
                raise ValueError(f"{name}: expected integers, got {grid.dtype}")
    videos = 0 if video_grid_thw is None else len(video_grid_thw)
    seconds, scale = _seconds_and_scale(second_per_grid_ts, rules, videos, tokens.device)
    merge = rules.spatial_merge_size
    arguments = (image_grid_thw, video_grid_thw, seconds, scale, merge, rules.separate_frame_groups)
    if validate or not tokens.is_cuda:
        check_values(mm_token_type_ids, attention_mask, image_grid_thw, video_grid_thw, second_per_grid_ts, merge)
    if validate and tokens.is_cuda:  # the host's implementation raises if the grids do not match the tokens
        ops.rope_index(tokens, image_token, video_token, attention_mask, *arguments, impl="reference")
    return ops.rope_index(tokens, image_token, video_token, attention_mask, *arguments)


def _seconds_and_scale(
    seconds: SecondPerGridTs | None, rules: MRopeRules, videos: int, device: torch.device
) -> tuple[Tensor | None, int]:
    """Return `[videos]` seconds between the frame groups of each video (None: 1), and temporal positions per second."""
    scale = rules.tokens_per_second
    if seconds is None:
        return None, 1 if scale is None else scale
    if scale is None:
        raise ValueError("second_per_grid_ts: expected None, since only qwen2_5_vl positions frame groups by seconds")
    if isinstance(seconds, Sequence):
        tensors = [second for second in seconds if isinstance(second, Tensor)]
        if tensors and len(tensors) == len(seconds):
            seconds = torch.stack(tensors)
    if not isinstance(seconds, Tensor):
        values = seconds.tolist() if isinstance(seconds, np.ndarray) else seconds
        if not isinstance(values, Sequence) or not all(isinstance(second, Real) for second in values):
            raise TypeError(f"second_per_grid_ts: expected a tensor or a sequence of numbers, got {seconds!r}")
        # transformers scales Python floats in double precision, then rounds to float32.
        seconds = torch.tensor([scale * float(second) for second in values], dtype=torch.float32)
        seconds = seconds.to(
            device, non_blocking=True
        )  # CUDA stages a copy from unpinned memory, without synchronising
        scale = 1
    elif seconds.dtype not in SECOND_PER_GRID_FLOATS and not _is_integer(seconds):
        raise ValueError(f"second_per_grid_ts: expected floating-point or integer numbers, got {seconds.dtype}")
    _check_tensor("second_per_grid_ts", seconds, (videos,), device)
    return seconds.detach(), scale


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _check_tokens(name: str, tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a tensor [batch, sequence], got {type(tokens).__name__}")
    if tokens.ndim != 2 or not tokens.numel() or not _is_integer(tokens):
        raise ValueError(
            f"{name}: expected integers [batch, sequence], at least one, got {list(tokens.shape)} {tokens.dtype}"
        )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, that of the tokens, got {tensor.device}")
