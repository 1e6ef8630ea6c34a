"""One attention layer of a Qwen-VL tower, built of the operations in `qwenvit.ops`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenvit import ops
from qwenvit.arguments import Impl
from qwenvit.attention_ops import HEAD_DIMS
from qwenvit.packing import adjacent_pairs

WINDOW = 64
"""Attention within segments of up to so many tokens rotates queries and keys itself (`qwenvit.ops.rope_attention`)."""


class VisionAttention(nn.Module):
    """QKV projection with 2-D RoPE, attention within segments, output projection; for inference.

    Parameters are `qkv.weight`, `qkv.bias`, `proj.weight` and `proj.bias`, as in the checkpoints' `blocks.N.attn`:
    `load_state_dict` takes and `state_dict` gives the checkpoints' order of rows. In memory the rows of Q and K lie as
    `qwenvit.packing.pack_qkv` puts them, so write to `qkv` through `load_state_dict` alone. Parameters ask for no
    gradient: the Triton kernels give none.

    Args:
        hidden_size: C, channels of the hidden states.
        num_heads: H; C / H is one of 64, 72 and 80.
        impl: implementation of the operations, see `qwenvit.ops`.
        device: where the parameters go.
        dtype: bfloat16, float16 or float32; the hidden states' too.

    Raises:
        ValueError: a head width the kernels are not made for.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads or hidden_size // num_heads not in HEAD_DIMS:
            expected = f"num_heads times one of {HEAD_DIMS}"
            raise ValueError(f"hidden_size: expected {expected}, got {hidden_size} with num_heads={num_heads}")
        self.num_heads = num_heads
        self.impl = impl
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, device=device, dtype=dtype)
        self.proj = nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)
        self.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_pack)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_unpack)  # type: ignore[no-untyped-call]

    def forward(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: `[S, C]`, contiguous.
            cos: `[S, C / H]` fp32, the second half of each row like the first (`GridPlan.cos`).
            sin: same (`GridPlan.sin`).
            cu_seqlens: `[segments + 1]` int32, as for `qwenvit.ops.rope_attention` (`GridPlan.frames.cu_seqlens`).
            max_seqlen: tokens in the longest segment where known; up to 64 choose the kernel for windows.

        Returns:
            `[S, C]` in the dtype of `hidden_states`.

        Raises:
            TypeError, ValueError: as the operations do.
        """
        weight, bias = self.qkv.weight, self.qkv.bias
        angles: tuple[Tensor | None, Tensor | None] = (cos, sin)
        if max_seqlen is not None and max_seqlen <= WINDOW:
            qkv = F.linear(hidden_states, weight, bias)
        else:
            qkv = ops.qkv_rope(hidden_states, weight, bias, cos, sin, self.num_heads, impl=self.impl)
            angles = (None, None)
        q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        out = ops.rope_attention(q, k, v, *angles, cu_seqlens, max_seqlen, interleaved=True, impl=self.impl)
        return self.proj(out.flatten(1))


def _reorder(layer: VisionAttention, state_dict: dict[str, Any], prefix: str, packed: bool) -> None:
    for name in (f"{prefix}qkv.weight", f"{prefix}qkv.bias"):
        rows = state_dict.get(name)
        if isinstance(rows, Tensor) and len(rows) == layer.qkv.out_features:  # others are load_state_dict's to refuse
            order = adjacent_pairs(layer.num_heads, layer.qkv.in_features // layer.num_heads, rows.device)
            state_dict[name] = rows[order if packed else order.argsort()]


def _pack(layer: VisionAttention, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    _reorder(layer, state_dict, prefix, packed=True)


def _unpack(layer: VisionAttention, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    _reorder(layer, state_dict, prefix, packed=False)
