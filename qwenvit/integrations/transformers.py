"""qwenvit's rope index inside a loaded transformers model."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwenvit.mrope.positions import rope_index
from qwenvit.mrope.rules import rules_of


class RopeIndexHandle:
    """What `use_rope_index` returns: `remove()`, or leaving a `with` block, gives the model its own method back."""

    def __init__(self, module: nn.Module) -> None:
        self._module: nn.Module | None = module

    def remove(self) -> None:
        """Give the model its own `get_rope_index` back; a second call does nothing."""
        if self._module is not None:
            del self._module.get_rope_index
            self._module = None

    def __enter__(self) -> "RopeIndexHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def use_rope_index(model: nn.Module) -> RopeIndexHandle:
    """Let a transformers Qwen-VL model compute its M-RoPE positions with `qwenvit.rope_index`.

    Positions and generated tokens stay the same (transformers 5.17 truncates `second_per_grid_ts` to whole seconds;
    from here on fractions count, as in 5.23). On a GPU the call no longer synchronises; what it then no longer notices
    is said at `qwenvit.rope_index`, under `validate`. A copy of the model (deepcopy, pickle) keeps the replacement.

    Args:
        model: any model of transformers 5.3 or later that holds a Qwen2-VL, Qwen2.5-VL, Qwen3-VL (MoE included) or
            Qwen3.5 model, wrapped (PEFT, DDP) or not.

    Returns:
        A handle whose `remove()` undoes it; also a context manager.

    Raises:
        TypeError: `model` is no module, or holds no such model.
        ValueError: its family is not supported, its transformers is older than 5.3, or the method is replaced already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    found = [module for module in model.modules() if hasattr(type(module), "get_rope_index")]
    if len(found) != 1:
        raise TypeError(
            f"model: expected one Qwen-VL model in it, found {len(found)} modules with get_rope_index in "
            f"{type(model).__name__}"
        )
    module: Any = found[0]
    scaled = rules_of(module.config).tokens_per_second is not None
    if "mm_token_type_ids" not in inspect.signature(type(module).get_rope_index).parameters:
        raise ValueError(
            "model: expected a model of transformers 5.3 or later, whose get_rope_index takes mm_token_type_ids "
            "(4.x counts deltas from the padded length)"
        )
    if "get_rope_index" in vars(module):
        raise ValueError(
            "model: its get_rope_index is replaced already; remove that first (in a copy of a model in use, with "
            "`del` of that attribute)"
        )
    module.get_rope_index = functools.partial(_get_rope_index, module.config, scaled)
    return RopeIndexHandle(module)


def _get_rope_index(
    config: Any,
    scaled: bool,  # whether the family places frames by seconds; others are given them and pass them over
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
    attention_mask: Tensor | None = None,
    **_: object,  # generation passes all of its model inputs
) -> tuple[Tensor, Tensor]:
    def here(tensor: Any) -> Any:  # a model spread over devices may have left some inputs elsewhere
        if not isinstance(tensor, torch.Tensor):
            return tensor
        # Towards the host a copy that does not block would be read before it is there.
        return tensor.to(input_ids.device, non_blocking=input_ids.is_cuda)

    return rope_index(
        input_ids=input_ids,
        mm_token_type_ids=here(mm_token_type_ids),
        image_grid_thw=here(image_grid_thw),
        video_grid_thw=here(video_grid_thw),
        second_per_grid_ts=here(second_per_grid_ts) if scaled else None,
        attention_mask=here(attention_mask),
        family=config,
    )
