"""RoPE and attention within segments: which kernel runs, and the operation that torch knows."""

from collections.abc import Callable
from functools import cache

import torch
import triton
from torch import Tensor

from qwenvit.kernels.attention.rotate import rotate_by_head
from qwenvit.kernels.attention.varlen import varlen_attention
from qwenvit.kernels.attention.window import WINDOW, window_attention
from qwenvit.kernels.device import capability
from qwenvit.kernels.registration import register


@cache
def runs_hopper(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether long segments go to `hopper_attention`: on sm_90, in 16 bits, with the Gluon of triton 3.6 or later.

    It does not depend on lengths, since the two kernels sum in different orders, and a segment's bits may not depend on
    the others. On an H200, inputs rotated before, it is 1.2 to 1.7 times as fast as `varlen_attention` from 1024 tokens
    on at head_dim 72 and 80, and 1.06 to 1.4 times from 2304 on at 64; but 7 to 11 % slower for one sequence of 1024 or
    1764 at 64, and, with the rotation, 4 to 9 % at 784, whose tiles fill no whole rounds.
    """
    if device.type != "cuda" or dtype == torch.float32 or capability(device) != (9, 0):
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


@cache
def _load_hopper() -> Callable[..., None]:
    from qwenvit.kernels.attention.hopper import hopper_attention  # Gluon, which older versions of Triton lack

    return hopper_attention


def _on_hopper(
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
    """What `varlen_attention` does, by `hopper_attention`."""
    hopper_attention = _load_hopper()
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
    """`[S, H, D]`, with no host synchronisation; see `qwenvit.ops.rope_attention`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() and len(cu_seqlens) > 1:
        attend = _on_hopper if runs_hopper(q.device, q.dtype) else varlen_attention
        if max_seqlen is not None and max_seqlen <= WINDOW:
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
