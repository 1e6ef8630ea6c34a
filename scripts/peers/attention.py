"""What the kernels are measured against: attention libraries, transformers' RoPE, and `torch.compile`."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from qwenvit import ops
from qwenvit.plan.rope import apply_rope

FLAGS = (
    "Rivals: cuDNN is `scaled_dot_product_attention` under `sdpa_kernel(CUDNN_ATTENTION)`, segments of one length as a "
    "batch; FA2 is `torch.nn.attention.varlen.varlen_attn`; FA3 is `_vllm_fa3_C.fwd` with `cu_seqlens`; each reads "
    "views of the packed projection, rotated before. torch RoPE is transformers' sequence in fp32. cuBLAS is "
    "`F.linear`. `torch.compile` runs with `fullgraph=True, dynamic=False`, anew for each shape."
)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""Queries, keys, values `[S, H, D]`, cu_seqlens and max_seqlen -> `[S, H, D]`."""


def fa2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """FlashAttention 2 with variable lengths, as torch has it."""
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)


def cudnn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """cuDNN through SDPA, segments of one length as a batch."""
    batch = (len(cu_seqlens) - 1, longest)
    q, k, v = (x.unflatten(0, batch).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def fa3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """FlashAttention 3 with variable lengths, from the library that `load_fa3` read."""
    out, *_ = torch.ops._vllm_fa3_C.fwd(
        q, k, v, None, None, None, None, cu_seqlens, cu_seqlens, None, None, None, longest, longest,
        None, None, None, None, None, None, None, None, None, q.shape[2] ** -0.5, False, -1, -1, 0.0, True, None,
        1, None, 0, None, 1, 0, None,
    )  # fmt: skip
    return out


def load_fa3(path: Path) -> None:
    torch.ops.load_library(str(path))


def split(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Views `[S, H, D]` of queries, keys and values."""
    return qkv.unflatten(1, (3, num_heads, -1)).unbind(1)


def torch_rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries and keys rotated, in the operations of transformers' `apply_rotary_pos_emb_vision`."""
    q, k, v = split(qkv, num_heads)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def triton_rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> tuple[Tensor, ...]:
    """The same in one fused pass in place; our own kernel, the fastest there is to put before a rival's attention."""
    return split(ops.rotate_qk_(qkv, cos, sin, num_heads, interleaved, impl="triton"), num_heads)
