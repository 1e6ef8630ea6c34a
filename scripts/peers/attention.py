"""Rivals of the attention kernels: attention libraries after RoPE by torch or by a fused Triton pass."""

import importlib
import site
import sys
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
    "batch; FA2 is `torch.nn.attention.varlen.varlen_attn`; FA3 is `_vllm_fa3_C.fwd` with `cu_seqlens`; FA4 is "
    "`flash_attn.cute.flash_attn_varlen_func`; each reads views of the packed projection, rotated before. FA4 "
    "contiguous reads contiguous tensors instead, and FA4 dense is `flash_attn.cute.flash_attn_func` on those, "
    "segments of one length as a batch. torch RoPE is transformers' sequence in fp32. cuBLAS is `F.linear`. "
    "`torch.compile` runs with `fullgraph=True, dynamic=False`, anew for each shape."
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


def fa4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Run FlashAttention 4 over segments of any lengths, from the package that `load_libraries` imported."""
    from flash_attn.cute import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        softmax_scale=q.shape[2] ** -0.5,
    )  # fmt: skip
    return _output_of(out)


def fa4_dense(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Run FlashAttention 4 without `cu_seqlens`, with segments of equal length as a batch."""
    from flash_attn.cute import flash_attn_func

    batch = (len(cu_seqlens) - 1, max_seqlen)
    out = flash_attn_func(*(x.unflatten(0, batch) for x in (q, k, v)), softmax_scale=q.shape[2] ** -0.5)
    return _output_of(out).flatten(0, 1)


def _output_of(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output alone: FlashAttention 4 returns it with the log-sum-exp, or by itself in some versions."""
    return returned[0] if isinstance(returned, tuple) else returned


def load_libraries(fa3_library: Path | None = None, fa4_folder: Path | None = None) -> dict[str, Attention]:
    """Return the attention libraries by name: cuDNN and FA2, which torch has, and FA3 and FA4 where they are given.

    Args:
        fa3_library: vLLM's FlashAttention 3 library (`_vllm_fa3_C`), which is loaded.
        fa4_folder: folder that flash-attn-4 was installed into; it is imported from there.

    Raises:
        OSError: FlashAttention 3 does not load.
        ImportError: the folder has no flash-attn-4, or not all that it needs.
    """
    libraries: dict[str, Attention] = {"cuDNN": cudnn, "FA2": fa2}
    if fa3_library is not None:
        torch.ops.load_library(str(fa3_library))
        libraries["FA3"] = fa3
    if fa4_folder is not None:
        sys.path.insert(0, str(fa4_folder))
        site.addsitedir(str(fa4_folder))  # reads the folder's .pth files: cutlass-dsl is found through one
        importlib.import_module("flash_attn.cute")
        libraries["FA4"] = fa4
    return libraries


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
