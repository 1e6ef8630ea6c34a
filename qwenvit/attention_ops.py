"""Attention within segments, queries and keys rotated on the way."""

import math

import torch
from torch import Tensor

from qwenvit import op_references
from qwenvit.arguments import DTYPES, Impl
from qwenvit.dispatch import use_triton

HEAD_DIMS = (64, 72, 80)
"""Channels per head of every published tower."""


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

    With S tokens, H heads and head_dim D, segments of up to 64 tokens move 4·S·H·D elements (Q, K and V read once, the
    output written once) and 4·S·D bytes of angles; longer ones 4·S·H·D elements more, for the rotated Q and K, and
    2·S·H·D for a V of head_dim 72 in 16 bits, which is moved to whole sectors with them. A segment of L tokens takes
    4·L²·H·D FLOPs. Inference only: no gradient flows through `impl="triton"`.

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
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_heads(name, x, q)
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected two tensors or None twice, got one of each")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles is not None:
            _check_angles(name, angles, q)
    _check_cu_seqlens(cu_seqlens, q)
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0):
        raise ValueError(f"max_seqlen: expected None or a number of tokens, got {max_seqlen!r}")
    if scale is None:
        scale = q.shape[2] ** -0.5
    elif not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"scale: expected None or a positive number, got {scale!r}")
    if not use_triton(impl, q):
        return op_references.rope_attention(q, k, v, cos, sin, cu_seqlens, scale, interleaved)
    import qwenvit.kernels.rope_attention  # noqa: F401  (registers the operation)

    return torch.ops.qwenvit.rope_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale, interleaved)


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _check_heads(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES.values():
        raise TypeError(f"{name}: expected a bfloat16, float16 or float32 tensor [S, H, D], got {_kind(x)}")
    if x.ndim != 3 or x.shape[2] not in HEAD_DIMS:
        raise ValueError(f"{name}: expected shape [S, H, D] with D one of {HEAD_DIMS}, got {list(x.shape)}")
    if x.stride(2) != 1 and x.numel():
        raise ValueError(f"{name}: expected an inner stride of 1, got strides {x.stride()}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected {q.dtype} as q has, got {x.dtype}")
    if x.shape != q.shape or x.device != q.device:
        expected = f"{list(q.shape)} on {q.device} as q"
        raise ValueError(f"{name}: expected {expected}, got {list(x.shape)} on {x.device}")


def _check_angles(name: str, angles: Tensor, q: Tensor) -> None:
    shape = [q.shape[0], q.shape[2]]
    if not isinstance(angles, Tensor) or angles.dtype != torch.float32:
        raise TypeError(f"{name}: expected a float32 tensor {shape}, got {_kind(angles)}")
    if list(angles.shape) != shape or angles.stride(1) != 1 or angles.device != q.device:
        got = f"{list(angles.shape)} with strides {angles.stride()} on {angles.device}"
        raise ValueError(f"{name}: expected {shape} with inner stride 1 on {q.device}, got {got}")


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected an int32 tensor [segments + 1], got {_kind(cu_seqlens)}")
    fits = cu_seqlens.ndim == 1 and len(cu_seqlens) and cu_seqlens.is_contiguous() and cu_seqlens.device == q.device
    if not fits:
        got = f"{list(cu_seqlens.shape)} with strides {cu_seqlens.stride()} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens: expected [segments + 1], contiguous, on {q.device}, got {got}")
