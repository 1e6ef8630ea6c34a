"""Attention mode: the attention of vLLM's own vision tower runs on `qwenvit.ops.rope_attention`.

All else stays vLLM's, so linears may be quantised, split over ranks (tensor parallelism) or adapted (LoRA). Queries,
keys and values are views of the QKV product: vLLM copies queries and keys to rotate them, then attends.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qwenvit import ops
from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.attention import HEAD_DIMS

_ARGUMENTS = ("x", "cu_seqlens", "rotary_pos_emb_cos", "rotary_pos_emb_sin", "max_seqlen")
ARGUMENTS = {
    "Qwen2VisionAttention": _ARGUMENTS,
    "Qwen2_5_VisionAttention": (*_ARGUMENTS, "sequence_lengths"),  # of Qwen3's towers too
}
"""Names of vLLM's attention classes, and the arguments of their `forward`, in all versions from 0.22 to 0.33."""
WHOLE_FRAMES = 2**31 - 1
"""`max_seqlen` of blocks that attend to whole frames, whose length is not looked at."""


def use_attention(visual: nn.Module, config: VisionConfig, impl: Impl = "auto") -> None:
    """Make a vision tower of vLLM attend with `qwenvit.ops.rope_attention`.

    The attention modules, their parameters and their names stay; only their `forward` is another. It works in blocks
    that vLLM compiles (`compile_mm_encoder`) and in its encoder CUDA graphs (`cudagraph_mm_encoder`), where trailing
    segments are empty and the rows past the last one belong to none; `"reference"` cannot be captured in graphs.

    Args:
        visual: a tower that vLLM 0.22 to 0.33 has built, before or after it has loaded weights.
        config: the config of this tower. Its windows choose the kernel, block by block.
        impl: implementation of the operation, see `qwenvit.ops`.

    Raises:
        ValueError: the tower's attention is not of the kind that this replaces, or `impl` is unknown. Nothing has been
            replaced then.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'reference', got {impl!r}")
    blocks = list(getattr(visual, "blocks", ()))
    if len(blocks) != config.depth:
        raise ValueError(f"visual: expected a tower with {config.depth} blocks as its config has, got {len(blocks)}")
    for block in blocks:
        _check_attention(getattr(block, "attn", None))
    for number, block in enumerate(blocks):
        max_seqlen = WHOLE_FRAMES if config.is_full_attention(number) else config.window_patches
        block.attn.qwenvit_impl = impl
        # Not an integer: vLLM takes what it has compiled for one block for all of them. vLLM's own lengths are
        # tensors on the CPU too.
        block.attn.qwenvit_max_seqlen = torch.tensor(max_seqlen, device="cpu")
        kind: Any = type(block.attn)
        block.attn.__class__ = _with_rope_attention(kind)


def _check_attention(attention: Any) -> None:
    """Raise ValueError with the reason why this module's `forward` cannot be replaced."""
    if isinstance(attention, _RopeAttention):
        raise ValueError("visual: expected vLLM's own attention, got one that use_attention has replaced")
    kind = type(attention).__name__
    if kind not in ARGUMENTS:
        raise ValueError(f"visual: expected blocks with an attention of {', '.join(ARGUMENTS)}, got {kind}")
    arguments = tuple(inspect.signature(attention.forward).parameters)
    if arguments != ARGUMENTS[kind]:
        raise ValueError(f"visual: expected a {kind} called with {', '.join(ARGUMENTS[kind])}, got {arguments}")
    head_dim = attention.hidden_size_per_attention_head
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"visual: expected heads of {HEAD_DIMS} channels, got {head_dim}")
    backend = getattr(attention.attn.attn_backend, "name", attention.attn.attn_backend)
    if backend == "FLASHINFER":
        raise ValueError(
            "visual: expected cu_seqlens that count tokens, got mm_encoder_attn_backend='FLASHINFER', for which vLLM "
            "counts elements"
        )
    if attention.attn.fp8_enabled:
        raise ValueError("visual: expected attention in the model's dtype, got mm_encoder_attn_dtype='fp8'")


class _RopeAttention(nn.Module):
    """The `forward` that is put in front of that of a vLLM class of attention."""

    qkv: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    proj: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    split_qkv: Callable[[Tensor], tuple[Tensor, ...]]
    num_attention_heads_per_partition: int
    hidden_size_per_attention_head: int
    attn: Any
    qwenvit_max_seqlen: Tensor
    qwenvit_impl: Impl

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        rotary_pos_emb_cos: Tensor | None,
        rotary_pos_emb_sin: Tensor | None,
        **_lengths: Tensor | int | None,
    ) -> Tensor:
        """Attend within segments, `[S, 1, C]` to `[S, 1, C]`.

        vLLM's `max_seqlen` is not used: it depends on the batch, and the kernel of a segment must not. Nor is
        `sequence_lengths`, which is None except with the backend FLASHINFER.

        Args:
            x: hidden states.
            cu_seqlens: `[segments + 1]` int32, of windows or of frames.
            rotary_pos_emb_cos: `[S, D / 2]` in the model's dtype, or None for no rotation.
            rotary_pos_emb_sin: as `rotary_pos_emb_cos`.
        """
        if x.shape[1] != 1:
            raise ValueError(f"x: expected images packed into one sequence [S, 1, C], got {list(x.shape)}")
        qkv, _ = self.qkv(x)
        if hasattr(self, "split_qkv"):
            # Qwen2-VL: with tensor parallelism a rank's columns are no whole heads of each, so vLLM gathers all.
            parts = self.split_qkv(qkv)
        else:
            heads = (3, self.num_attention_heads_per_partition, self.hidden_size_per_attention_head)
            parts = qkv.unflatten(2, heads).unbind(2)
        q, k, v = (part.squeeze(1) for part in parts)  # [S, H, D]
        given = q, k, v, rotary_pos_emb_cos, rotary_pos_emb_sin, cu_seqlens
        max_seqlen, scale, impl = self.qwenvit_max_seqlen, self.attn.scale, self.qwenvit_impl
        if torch.compiler.is_compiling():
            out = _attend(*given, max_seqlen, scale, impl)
        else:  # a registered operation takes Python longer, and a tower that is not compiled waits for Python
            out = ops.rope_attention(*given, int(max_seqlen), scale, impl=impl)
        projected, _ = self.proj(out.flatten(1).unsqueeze(1))
        return projected


@cache
def _with_rope_attention(kind: Any) -> type[nn.Module]:
    """Return the subclass of a vLLM class of attention that runs `_RopeAttention.forward`."""
    return type(f"Rope{kind.__name__}", (_RopeAttention, kind), {"__module__": __name__})


@torch.library.custom_op("qwenvit::attend_in_vllm", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: Tensor,
    scale: float,
    impl: str,
) -> Tensor:
    """Return `qwenvit.ops.rope_attention`, `[S, H, D]`, as one operation of a compiled block.

    `max_seqlen` is a number on the CPU, so that reading it waits for no GPU.
    """
    return ops.rope_attention(q, k, v, cos, sin, cu_seqlens, int(max_seqlen), scale, impl=impl)  # type: ignore[arg-type]


@_attend.register_fake
def _attend_fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
