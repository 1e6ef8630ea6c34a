"""RoPE and attention within segments: the choice of the kernel, and the operation registered with torch."""

from collections.abc import Callable
from functools import cache

import torch
import triton
from torch import Tensor

from qwenvit.kernels.attention.rotate import rotate_by_head
from qwenvit.kernels.attention.varlen import varlen_attention
from qwenvit.kernels.attention.window import MAX_WINDOW, window_attention
from qwenvit.kernels.device import capability
from qwenvit.kernels.registration import register


@cache
def runs_hopper(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether long segments go to `hopper_attention`: on sm_90, in 16 bits, with triton 3.6 or later.

    Lengths do not matter: the two kernels sum in different orders, and a segment's bits must not depend on the others.
    `hopper_attention` is faster at nearly all lengths (TUNING.md).
    """
    if device.type != "cuda" or dtype == torch.float32 or capability(device) != (9, 0):
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


@cache
def _import_hopper_attention() -> Callable[..., None]:
    from qwenvit.kernels.attention.hopper import hopper_attention  # needs Gluon, which older versions of Triton lack

    return hopper_attention


def _varlen_attention_on_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    interleaved: bool,
    out: Tensor,
) -> None:
    """Do what `varlen_attention` does with `hopper_attention`."""
    hopper_attention = _import_hopper_attention()
    if cos is None or sin is None:
        hopper_attention(q, k, v, cu_seqlens, scale, out)
        return
    pairs = rotate_by_head(q, k, v, cos, sin, interleaved)
    if q.shape[2] == 64:
        hopper_attention(*(first for first, _ in pairs), cu_seqlens, scale, out)
    else:
        hopper_attention(*pairs, cu_seqlens, scale, out)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """Return attention within segments, `[S, H, D]`, without a host synchronisation.

    `v` is `[S, H, D]`, or `[S, H, 80]` with D = 72 and ones. `qwenvit.ops.rope_attention` documents and checks the
    arguments.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() and len(cu_seqlens) > 1:
        if cos is not None and sin is not None and cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()  # the kernels address both alike
        attend = _varlen_attention_on_hopper if runs_hopper(q.device, q.dtype) else varlen_attention
        if max_seqlen is not None and max_seqlen <= MAX_WINDOW:
            attend = window_attention
        with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be the tensor's
            attend(q, k, v, cos, sin, cu_seqlens, scale, interleaved, out)
    return out


def _fake(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


rope_attention_op = register(
    "rope_attention(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor cu_seqlens, int? max_seqlen, "
    "float scale, bool interleaved) -> Tensor",
    rope_attention,
    _fake,
)
