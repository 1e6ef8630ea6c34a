"""Rivals of the attention kernels: attention libraries after RoPE by torch or by a fused Triton pass."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from qwenvit import ops
from qwenvit.plan.rope import apply_rope

HOW_RIVALS_RUN = (
    "Rivals: cuDNN is `scaled_dot_product_attention` under `sdpa_kernel(CUDNN_ATTENTION)`, segments of one length as a "
    "batch; FA2 is `torch.nn.attention.varlen.varlen_attn`; FA3 is `_vllm_fa3_C.fwd` with `cu_seqlens`; each reads "
    "views of the packed projection, rotated before. torch RoPE is transformers' sequence in fp32. cuBLAS is "
    "`F.linear`. `torch.compile` runs with `fullgraph=True, dynamic=False`, anew for each shape."
)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""Queries, keys, values `[S, H, D]`, cu_seqlens and max_seqlen -> `[S, H, D]`."""


def fa2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Run torch's FlashAttention 2 over segments of any lengths."""
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)


def cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Run cuDNN's attention through SDPA, with segments of equal length as a batch."""
    batch = (len(cu_seqlens) - 1, max_seqlen)
    q, k, v = (x.unflatten(0, batch).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def fa3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Run FlashAttention 3 over segments of any lengths, from the library that `load_fa3` loaded."""
    out, *_ = torch.ops._vllm_fa3_C.fwd(
        q, k, v, None, None, None, None, cu_seqlens, cu_seqlens, None, None, None, max_seqlen, max_seqlen,
        None, None, None, None, None, None, None, None, None, q.shape[2] ** -0.5, False, -1, -1, 0.0, True, None,
        1, None, 0, None, 1, 0, None,
    )  # fmt: skip
    return out


def load_fa3(path: Path) -> None:
    """Load vLLM's FlashAttention 3 library (`_vllm_fa3_C`)."""
    torch.ops.load_library(str(path))


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return views `[S, H, D]` of the queries, keys and values in a packed projection `[S, 3·H·D]`."""
    return qkv.unflatten(1, (3, num_heads, -1)).unbind(1)


def torch_rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Split a packed projection and rotate its queries and keys as transformers' `apply_rotary_pos_emb_vision` does."""
    q, k, v = split_qkv(qkv, num_heads)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def triton_rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> tuple[Tensor, ...]:
    """Split a packed projection and rotate queries and keys in place by qwenvit's fused pass.

    It is the fastest pass there is to run before a rival's attention.
    """
    return split_qkv(ops.rotate_qk_(qkv, cos, sin, num_heads, interleaved, impl="triton"), num_heads)
