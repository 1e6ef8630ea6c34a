"""Run the attention of a loaded transformers model's vision tower with `qwenvit.ops.rope_attention`."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenvit import ops
from qwenvit.arguments import Impl
from qwenvit.integrations.transformers.handle import Handle
from qwenvit.integrations.transformers.loaded_tower import find_tower
from qwenvit.integrations.transformers.tower import is_replaced
from qwenvit.ops.attention import HEAD_DIMS

NAMES: dict[Impl, str] = {
    "auto": "qwenvit_flash",
    "triton": "qwenvit_flash_triton",
    "reference": "qwenvit_flash_reference",
}
"""Names in transformers' registry of attention functions, by `impl`.

transformers passes `cu_seqlens` only to functions with "flash" in their name, and reads a digit after it as the version
of FlashAttention.
"""


class AttentionHandle(Handle):
    """Undo `use_attention`: `remove()`, or leaving a `with` block, restores the tower's own attention."""


def use_attention(model: nn.Module, impl: Impl = "auto") -> AttentionHandle:
    """Make the vision tower of a loaded transformers model attend with `qwenvit.ops.rope_attention`.

    All else in the tower stays transformers' own, so hooks, adapters (LoRA), quantised linears and tensor parallelism
    go on working. `use_tower` replaces the whole tower, where that is possible. The language model keeps its attention.

    Results equal those of transformers' attention up to rounding. A frame of at most 64 patches may be rounded
    otherwise where it shares its batch with larger ones. A copy of the model (deepcopy) keeps the replacement, and
    models that were built from one config object change together.

    Args:
        model: a model of transformers 5.3 or later that contains one vision tower of Qwen2-VL, Qwen2.5-VL, Qwen3-VL
            (MoE included), Qwen3.5 (MoE included), Qwen2.5-Omni or Qwen3-Omni, wrapped (PEFT, DDP) or not; heads have
            64, 72 or 80 channels, as in every published checkpoint. With transformers 5.3, though not with 5.17, each
            attention waits for the GPU, as transformers' own does.
        impl: `"triton"`, `"reference"` (torch's attention segment by segment, differentiable) or `"auto"` (Triton
            on a GPU, the reference elsewhere).

    Returns:
        A handle whose `remove()` restores the tower's own attention, unless another has been chosen since; also a
        context manager.

    Raises:
        TypeError: `model` is not a module, or does not contain exactly one such tower.
        ValueError: transformers is older than 5.3, `impl` is unknown, heads have another number of channels, the config
            asks for attention weights, or the attention or the whole tower is already replaced.

    The replaced attention raises ValueError if Triton is asked for gradients, as when the tower or an adapter on it is
    trained; a frozen tower passes, and `impl="reference"` gives gradients. It also raises ValueError if
    `output_attentions` is set, or for a mask, dropout or causal attention.
    """
    tower, config = find_tower(model)
    if impl not in NAMES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, NAMES))}, got {impl!r}")
    if config.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"model: expected a vision tower with heads of {HEAD_DIMS} channels, got heads of {config.head_dim}"
        )
    if is_replaced(tower):  # use_tower computes the attention too: the tower's own is not called
        raise ValueError("model: expected its own vision tower, got one that use_tower replaced")
    # transformers' own towers have one config object, but each attention reads the one it holds.
    held = [getattr(module, "config", None) for module in tower.modules()]
    configs: list[Any] = list({id(each): each for each in held if hasattr(each, "_attn_implementation")}.values())
    if any(hf_config._attn_implementation in NAMES.values() for hf_config in configs):
        raise ValueError(
            "model: expected the vision tower's own attention, got a replaced one; call remove() first (on a copied "
            "model, set_attn_implementation)"
        )
    if any(hf_config.output_attentions for hf_config in configs):
        raise ValueError("model: expected output_attentions=False in the vision tower's config, got True")
    for key, name in NAMES.items():
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_attend, key))  # for good: copies of the model look it up
    previous = [hf_config._attn_implementation for hf_config in configs]
    for hf_config in configs:
        hf_config._attn_implementation = NAMES[impl]

    def undo() -> None:
        for hf_config, name in zip(configs, previous, strict=True):
            if hf_config._attn_implementation == NAMES[impl]:
                hf_config._attn_implementation = name

    return AttentionHandle(undo)


def _attend(
    impl: Impl,
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within segments, as transformers calls an attention function: `[1, H, S, D]` to `[1, S, H, D]`.

    `query` and `key` are rotated already.

    Raises:
        ValueError: an argument asks for something else, or for gradients of Triton.
    """
    if attention_mask is not None:
        raise ValueError("attention_mask: expected None, since cu_seqlens separates the images, got a mask")
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}")
    if is_causal is not False:
        raise ValueError(f"is_causal: expected False, got {is_causal!r}")
    if cu_seq_lens_q is None or cu_seq_lens_k is not cu_seq_lens_q:
        raise ValueError("cu_seq_lens_q, cu_seq_lens_k: expected one tensor as both, got none or two")
    for name in ("output_attentions", "sliding_window", "softcap", "s_aux"):
        if (other := others.get(name)) is not None and other is not False:
            raise ValueError(f"{name}: expected none in a vision tower, got {other!r}")
    if len(query) != 1:
        raise ValueError(f"query: expected one packed sequence [1, H, S, D], got shape {list(query.shape)}")
    max_seqlen = int(max_length_q) if isinstance(max_length_q, Tensor) else max_length_q  # 5.3: a tensor
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = ops.rope_attention(q, k, v, None, None, cu_seq_lens_q, max_seqlen, scaling, impl=impl)
    return out[None], None
