"""M-RoPE positions: where each token of a text-and-vision sequence stands in time, height and width."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenvit import ops
from qwenvit.config.vision_config import VisionConfig
from qwenvit.mrope.rules import HFConfig, Rules, rules_of
from qwenvit.ops.mrope_host import IMAGE, VIDEO, Seconds, check_values

SECONDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of `second_per_grid_ts` beside integers."""


def rope_index(
    *,
    input_ids: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Seconds | None = None,
    attention_mask: Tensor | None = None,
    family: str | VisionConfig | HFConfig | Mapping[str, Any],
    tokens_per_second: int | None = None,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    spatial_merge_size: int | None = None,
    validate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions of each token on the three axes of M-RoPE, as transformers' `get_rope_index` gives them.

    Text counts on along all three axes. An image or video (in families whose videos carry timestamps: each of its
    frame groups) starts at the position that the next text token would have had; its tokens add their frame group,
    row and column to that, and what follows starts after its longer side. Where `second_per_grid_ts` is given, frame
    group `i` of a video adds `i * (tokens_per_second * second_per_grid_ts)` instead of `i`, computed in the dtype given
    (float32 for a sequence) and cut to a whole number. Tokens that the mask leaves out are passed over and get 0.
    Images that touch, which transformers refuses, are told apart by their grids.

    On a CUDA device nothing is read back: the call does not synchronise and can be captured in a CUDA graph (with
    `second_per_grid_ts` a CUDA tensor). Elsewhere it is computed on the CPU.

    Args:
        input_ids: `[B, S]` token ids, which mark vision tokens where there are no `mm_token_type_ids`.
        mm_token_type_ids: `[B, S]`, 0 for text, 1 for image, 2 for video tokens, as processors return them.
        image_grid_thw: `[images, 3]` integers, frame groups x rows x columns of patches, in order of appearance.
        video_grid_thw: `[videos, 3]`, likewise.
        second_per_grid_ts: `[videos]` seconds between frame groups, for `qwen2_5_vl` alone; None means 1 each.
        attention_mask: `[B, S]`, nonzero (True) where a token counts; any padding. None where every token does.
        family: `"qwen2_vl"`, `"qwen2_5_vl"`, `"qwen3_vl"` or `"qwen3_5"` (3.5 and later); or a VisionConfig, a
            transformers config or its dict, whose own values then replace the family's published ones.
        tokens_per_second: temporal positions per second, for `qwen2_5_vl` alone.
        image_token_id: the id that marks image tokens in `input_ids`.
        video_token_id: the id that marks video tokens in `input_ids`.
        spatial_merge_size: patches merged into one token along each side; 2 unless a config says otherwise.
        validate: whether to look at the values. None: where looking is free, on the CPU; there they are looked at in
            any case. On a CUDA device True synchronises, and without it grids that do not fit their tokens give
            positions that mean nothing (vision tokens past the last grid all get the position that follows it), but
            never a write outside the result.

    Returns:
        `position_ids`, `[3, B, S]` int64, and `deltas`, `[B, 1]` int64: one more than the greatest position of each
        row, less the number of its unmasked tokens (0 for a row without any). Both on the device of the inputs.

    Raises:
        TypeError: an argument is no tensor, or `family` no family or config.
        ValueError: a shape, dtype or device that does not fit, a scale given to a family without one, or (where
            values are looked at) token types other than 0, 1, 2 and grids that do not stand for the tokens there are.
    """
    rules = rules_of(family, tokens_per_second, image_token_id, video_token_id, spatial_merge_size)
    if input_ids is not None:
        _check_tokens("input_ids", input_ids)
    if mm_token_type_ids is not None:
        _check_tokens("mm_token_type_ids", mm_token_type_ids)
        if input_ids is not None:
            _check_beside("mm_token_type_ids", mm_token_type_ids, input_ids, input_ids.shape)
        tokens, image_token, video_token = mm_token_type_ids, IMAGE, VIDEO
    elif input_ids is not None:
        tokens, image_token, video_token = input_ids, rules.image_token_id, rules.video_token_id
    else:
        raise ValueError("input_ids: expected them or mm_token_type_ids, got neither")
    if attention_mask is not None:
        _check_beside("attention_mask", attention_mask, tokens, tokens.shape)
        if attention_mask.is_complex():
            raise ValueError(f"attention_mask: expected a real dtype, got {attention_mask.dtype}")
    for name, grid in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw)):
        if grid is not None:
            _check_beside(name, grid, tokens, (*getattr(grid, "shape", ())[:1], 3))
            if not _holds_integers(grid):
                raise ValueError(f"{name}: expected integers, got {grid.dtype}")
    seconds, scale = _seconds(second_per_grid_ts, rules, video_grid_thw, tokens)
    merge = rules.spatial_merge_size
    arguments = (image_grid_thw, video_grid_thw, seconds, scale, merge, rules.frames_apart)
    if validate or not tokens.is_cuda:
        check_values(mm_token_type_ids, attention_mask, image_grid_thw, video_grid_thw, second_per_grid_ts, merge)
    if validate and tokens.is_cuda:
        ops.rope_index(tokens, image_token, video_token, attention_mask, *arguments, impl="reference")
    return ops.rope_index(tokens, image_token, video_token, attention_mask, *arguments)


def _seconds(
    seconds: Seconds | None, rules: Rules, video_grid_thw: Tensor | None, tokens: Tensor
) -> tuple[Tensor | None, int]:
    """Seconds between the frame groups of each video, and temporal positions a second."""
    scale = rules.tokens_per_second
    if seconds is None:
        return None, 1 if scale is None else scale
    if scale is None:
        raise ValueError("second_per_grid_ts: only qwen2_5_vl places frames by seconds; leave it out")
    if isinstance(seconds, Sequence):
        tensors = [second for second in seconds if isinstance(second, Tensor)]
        if tensors and len(tensors) == len(seconds):
            seconds = torch.stack(tensors)
    if not isinstance(seconds, Tensor):  # scaled in double precision, then rounded, as transformers does with floats
        values = seconds.tolist() if isinstance(seconds, np.ndarray) else seconds
        if not isinstance(values, Sequence) or not all(isinstance(second, Real) for second in values):
            raise TypeError(f"second_per_grid_ts: expected a tensor or a sequence of numbers, got {seconds!r}")
        seconds = torch.tensor([scale * float(second) for second in values], dtype=torch.float32)
        seconds = seconds.to(tokens.device, non_blocking=True)  # from unpinned memory: staged, no synchronisation
        scale = 1
    elif seconds.dtype not in SECONDS and not _holds_integers(seconds):
        raise ValueError(f"second_per_grid_ts: expected floating-point or integer numbers, got {seconds.dtype}")
    _check_beside("second_per_grid_ts", seconds, tokens, (0 if video_grid_thw is None else len(video_grid_thw),))
    return seconds.detach(), scale


def _holds_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _check_tokens(name: str, tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a tensor [batch, sequence], got {type(tokens).__name__}")
    if tokens.ndim != 2 or not tokens.numel() or not _holds_integers(tokens):
        raise ValueError(
            f"{name}: expected integers [batch, sequence], at least one, got {list(tokens.shape)} {tokens.dtype}"
        )


def _check_beside(name: str, tensor: Tensor, tokens: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != tokens.device:
        raise ValueError(f"{name}: expected it on {tokens.device}, where the tokens are, got {tensor.device}")
