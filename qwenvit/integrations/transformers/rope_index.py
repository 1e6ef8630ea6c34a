"""Compute the M-RoPE positions of a loaded transformers model with `qwenvit.rope_index`."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwenvit.integrations.transformers.handle import Handle
from qwenvit.mrope.positions import rope_index
from qwenvit.mrope.rules import resolve_rules


class RopeIndexHandle(Handle):
    """Undo `use_rope_index`: `remove()`, or leaving a `with` block, restores the model's own method."""


def use_rope_index(model: nn.Module) -> RopeIndexHandle:
    """Make a transformers Qwen-VL model compute its M-RoPE positions with `qwenvit.rope_index`.

    Positions and generated tokens stay the same, with one exception: transformers 5.17 truncates `second_per_grid_ts`
    to whole seconds, while the replacement keeps fractions, as 5.23 does. On a GPU the call no longer synchronises, so
    it no longer detects invalid inputs (see `validate` of `qwenvit.rope_index`). A copy of the model (deepcopy, pickle)
    keeps the replacement.

    Args:
        model: a model of transformers 5.3 or later that contains one Qwen2-VL, Qwen2.5-VL, Qwen3-VL (MoE included) or
            Qwen3.5 model, wrapped (PEFT, DDP) or not.

    Returns:
        A handle whose `remove()` restores the model's own method; also a context manager.

    Raises:
        TypeError: `model` is not a module, or does not contain exactly one such model.
        ValueError: the family is not supported, transformers is older than 5.3, or the method is already replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    found = [module for module in model.modules() if hasattr(type(module), "get_rope_index")]
    if len(found) != 1:
        raise TypeError(
            f"model: expected exactly one module with get_rope_index, got {len(found)} in {type(model).__name__}"
        )
    module: Any = found[0]
    has_time_scale = resolve_rules(module.config).tokens_per_second is not None
    if "mm_token_type_ids" not in inspect.signature(type(module).get_rope_index).parameters:
        raise ValueError(
            "model: expected a model of transformers 5.3 or later, whose get_rope_index takes mm_token_type_ids "
            "(4.x counts deltas from the padded length)"
        )
    if "get_rope_index" in vars(module):
        raise ValueError(
            "model: expected its own get_rope_index, got a replaced one; call remove() first (on a copied model, "
            "`del` the attribute)"
        )
    module.get_rope_index = functools.partial(_get_rope_index, module.config, has_time_scale)
    return RopeIndexHandle(lambda: vars(module).pop("get_rope_index", None))


def _get_rope_index(
    config: Any,
    has_time_scale: bool,  # if not, second_per_grid_ts is ignored, as transformers does
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
    attention_mask: Tensor | None = None,
    **_: object,  # generation passes all of its model inputs
) -> tuple[Tensor, Tensor]:
    def to_input_device(tensor: Any) -> Any:  # inputs of a model on several devices may be on other ones
        if not isinstance(tensor, torch.Tensor):
            return tensor
        # A copy to the host must block: the CPU would read it before it is complete.
        return tensor.to(input_ids.device, non_blocking=input_ids.is_cuda)

    return rope_index(
        input_ids=input_ids,
        mm_token_type_ids=to_input_device(mm_token_type_ids),
        image_grid_thw=to_input_device(image_grid_thw),
        video_grid_thw=to_input_device(video_grid_thw),
        second_per_grid_ts=to_input_device(second_per_grid_ts) if has_time_scale else None,
        attention_mask=to_input_device(attention_mask),
        family=config,
    )
