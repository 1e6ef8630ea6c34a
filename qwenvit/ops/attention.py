"""Attention within segments, queries and keys rotated on the way."""

import math
from typing import Any

import torch
from torch import Tensor

from qwenvit.arguments import DTYPES, Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import check_floating, check_tensor
from qwenvit.ops.dispatch import use_triton

HEAD_DIMS = (64, 72, 80)
"""Channels per head of every published tower."""
FLOATING = tuple(DTYPES.values())


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    scale: float | None = None,
    interleaved: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Rotate queries and keys, then let each token attend to the tokens of its segment.

    With S tokens, H heads and head_dim D, and `max_seqlen` of at most 64, 4·S·H·D elements move (Q, K and V read once,
    the output written once) and 4·S·D bytes of angles. Otherwise, where there are angles, a pass reads and writes Q and
    K first: 4·S·H·D elements more, and 2·S·H·D for a V of head_dim 72 in 16 bits; it writes rows of 72 as 80. A segment
    of L tokens takes 4·L²·H·D FLOPs. Inference only: no gradient flows through `impl="triton"`.

    Args:
        q: `[S, H, D]`, bfloat16, float16 or float32 (in IEEE fp32, no TF32), D one of 64, 72 and 80. Any strides but
            the last, which is 1: a view of a packed projection `[S, 3·H·D]` will do. Strides and addresses that are
            multiples of 16 bytes are fastest.
        k: same.
        v: same.
        cos: `[S, D]` fp32, inner stride 1, the second half of each row like the first; None where q and k are rotated.
        sin: same.
        cu_seqlens: `[segments + 1]` int32 on the device of `q`, contiguous, rising from 0 to S; segments may be empty.
            `"triton"` trusts it and reads nothing back.
        max_seqlen: tokens in the longest segment where the caller knows: up to 64 choose the kernel for windows. A
            hint, of influence on speed alone.
        scale: factor on the scores, positive; None for 1 / √D.
        interleaved: whether the channels of a pair are 2i and 2i + 1 of a head (weights permuted at load) rather than
            i and i + D / 2 (as transformers has them).
        impl: `"triton"`, `"reference"` or `"auto"`.

    Returns:
        `[S, H, D]`, contiguous, in the dtype of `q`.

    Raises:
        TypeError: a dtype or type other than these.
        ValueError: shapes, strides, devices or values that do not fit.
    """
    at_a_glance = _fit(q, k, v, cu_seqlens)
    if not at_a_glance:
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_heads(name, x, q)
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected two tensors or None twice, got one of each")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles is not None:
            _check_angles(name, angles, q)
    if not at_a_glance:
        check_tensor("cu_seqlens", cu_seqlens, (None,), torch.int32, q)
    if not len(cu_seqlens):
        raise ValueError("cu_seqlens: expected at least one entry, got none")
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0):
        raise ValueError(f"max_seqlen: expected None or a number of tokens, got {max_seqlen!r}")
    if scale is None:
        scale = q.shape[2] ** -0.5
    elif not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"scale: expected None or a positive number, got {scale!r}")
    if not use_triton(impl, q):
        return reference.rope_attention(q, k, v, cos, sin, cu_seqlens, scale, interleaved)
    from qwenvit.kernels.attention.dispatch import rope_attention_op

    return rope_attention_op(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale, interleaved)


def _fit(q: Any, k: Any, v: Any, cu_seqlens: Any) -> bool:
    """Whether `_check_heads` and `check_tensor` will find nothing, seen at a glance: they take three times as long."""
    tensors = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    if not (tensors and isinstance(cu_seqlens, Tensor)):
        return False
    shape, dtype, device = q.shape, q.dtype, q.device
    return (
        len(shape) == 3
        and shape[2] in HEAD_DIMS
        and dtype in FLOATING
        and k.shape == shape == v.shape
        and k.dtype == dtype == v.dtype
        and k.device == device == v.device
        and q.stride(2) == k.stride(2) == v.stride(2) == 1
        and cu_seqlens.dtype == torch.int32
        and cu_seqlens.ndim == 1
        and cu_seqlens.device == device
        and cu_seqlens.is_contiguous()
    )


def _check_heads(name: str, x: Tensor, q: Tensor) -> None:
    check_floating(name, x, "[S, H, D]")
    if x.ndim != 3 or x.shape[2] not in HEAD_DIMS:
        raise ValueError(f"{name}: expected shape [S, H, D] with D one of {HEAD_DIMS}, got {list(x.shape)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected {q.dtype} as q has, got {x.dtype}")
    _check_rows(name, x, q.shape, q)


def _check_rows(name: str, x: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """As `op_checks.check_tensor`, with any strides but the last."""
    if x.shape != shape or x.device != q.device:
        raise ValueError(f"{name}: expected {list(shape)} on {q.device}, got {list(x.shape)} on {x.device}")
    if x.stride(-1) != 1 and x.numel():
        raise ValueError(f"{name}: expected an inner stride of 1, got strides {x.stride()}")


def _check_angles(name: str, angles: Tensor, q: Tensor) -> None:
    if not isinstance(angles, Tensor) or angles.dtype != torch.float32:
        got = angles.dtype if isinstance(angles, Tensor) else type(angles).__name__
        raise TypeError(f"{name}: expected a float32 tensor [S, D], got {got}")
    _check_rows(name, angles, (q.shape[0], q.shape[2]), q)
