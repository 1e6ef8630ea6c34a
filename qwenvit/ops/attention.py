"""Attention within segments, with rotary embedding of queries and keys."""

import math
from typing import Any

import torch
from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import FLOATING, check_floating, check_tensor
from qwenvit.ops.dispatch import use_triton
from qwenvit.ops.packing import value_width

HEAD_DIMS = (64, 72, 80)
"""Channels per head of the published towers."""


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
    """Rotate queries and keys (RoPE, arXiv:2104.09864), then attend within each segment.

    A segment of L tokens takes 4·L²·H·D FLOPs, with H heads of D channels. I/O for S tokens: with `max_seqlen` of at
    most 64, one kernel reads Q, K and V, writes the output (4·S·H·D elements) and reads D / 2 cosines and sines a token
    (S·D elements). Otherwise, if `cos` is given, a pass rotates Q and K first and moves 4·S·H·D elements more; it pads
    heads of 72 channels to 80 and, in 16-bit dtypes, copies V of 72 channels too (2·S·H·D). `impl="triton"` computes no
    gradients.

    Args:
        q: queries, `[S, H, D]`, bfloat16, float16 or float32 (IEEE fp32, no TF32), with D one of 64, 72 and 80. The
            last stride must be 1, the others are free: a view of a packed projection `[S, 3·H·D]` is accepted.
            Strides and addresses that are multiples of 16 bytes are fastest.
        k: keys, shape, dtype and device of `q`; last stride 1.
        v: values, shape, dtype and device of `q`; last stride 1. With D = 72 also `[S, H, 80]` whose last 8 channels
            are ones, as `rotate_qk_` writes them: so no kernel has to copy V. `"triton"` does not check that. Other
            values there make the result wrong on Hopper (16 bits, segments above 64), and have no effect elsewhere.
        cos: cosines of each pair's angle, `[S, D / 2]`, or `[S, D]` with equal halves in each row; fp32 or the dtype
            of `q`, last stride 1. The rotation is computed in fp32 with either. None if `q` and `k` are already
            rotated.
        sin: sines, in the shape and dtype of `cos`; None exactly if `cos` is None. Row strides other than those of
            `cos` cost a copy.
        cu_seqlens: `[segments + 1]` int32 on the device of `q`, contiguous, non-decreasing from 0 to S; segments may be
            empty. `"triton"` does not check the values, which would synchronise with the GPU.
        max_seqlen: tokens in the longest segment, if the caller knows. At most 64 selects the window kernel. A wrong
            value costs speed, not correctness. The window kernel rounds otherwise than the one for long segments: pass
            the same value (or None) for all batches where a segment's bits must not depend on the batch.
        scale: factor on the scores, positive; None means 1 / √D.
        interleaved: True if a rotary pair is channels 2i and 2i + 1 of a head (`qwenvit.packing.pack_qkv`), False if it
            is channels i and i + D / 2, as in transformers.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[S, H, D]`, contiguous, in the dtype of `q`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: an argument has another shape, stride, device or value; `"triton"` is asked for gradients.
    """
    checked = _passes_fast_check(q, k, v, cu_seqlens)
    if not checked:
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_heads(name, x, q, may_be_padded=name == "v")
    if cos is not None and sin is not None:
        _check_angles(cos, sin, q)
    elif cos is not sin:
        raise ValueError("cos, sin: expected two tensors or None twice, got one of each")
    if not checked:
        check_tensor("cu_seqlens", cu_seqlens, (None,), torch.int32, q)
    if not len(cu_seqlens):
        raise ValueError("cu_seqlens: expected at least one entry, got none")
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0):
        raise ValueError(f"max_seqlen: expected None or a number of tokens, got {max_seqlen!r}")
    if scale is None:
        scale = q.shape[2] ** -0.5
    elif not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"scale: expected None or a positive number, got {scale!r}")
    if not use_triton(impl, q, k, v, cos, sin):
        return reference.rope_attention(q, k, v, cos, sin, cu_seqlens, scale, interleaved)
    from qwenvit.kernels.attention.dispatch import rope_attention_op

    return rope_attention_op(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale, interleaved)


def _passes_fast_check(q: Any, k: Any, v: Any, cu_seqlens: Any) -> bool:
    """Return whether the tensors are valid, in a third of the time of the checks that say what is wrong."""
    tensors = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    if not (tensors and isinstance(cu_seqlens, Tensor)):
        return False
    shape, dtype, device = q.shape, q.dtype, q.device
    return (
        len(shape) == 3
        and shape[2] in HEAD_DIMS
        and dtype in FLOATING
        and k.shape == shape
        and (v.shape == shape or v.shape == (*shape[:2], value_width(shape[2])))
        and k.dtype == dtype == v.dtype
        and k.device == device == v.device
        and q.stride(2) == k.stride(2) == v.stride(2) == 1
        and cu_seqlens.dtype == torch.int32
        and cu_seqlens.ndim == 1
        and cu_seqlens.device == device
        and cu_seqlens.is_contiguous()
    )


def _check_heads(name: str, x: Tensor, q: Tensor, may_be_padded: bool) -> None:
    check_floating(name, x, "[S, H, D]")
    if x.ndim != 3 or x.shape[2] not in HEAD_DIMS:
        raise ValueError(f"{name}: expected shape [S, H, D] with D one of {HEAD_DIMS}, got {list(x.shape)}")
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected {q.dtype} as q has, got {x.dtype}")
    padded = (*q.shape[:2], value_width(q.shape[2]))
    _check_rows(name, x, padded if may_be_padded and x.shape == padded else q.shape, q)


def _check_rows(name: str, x: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """Raise ValueError unless `x` has this shape, the device of `q` and a last stride of 1."""
    if x.shape != shape or x.device != q.device:
        raise ValueError(f"{name}: expected {list(shape)} on {q.device}, got {list(x.shape)} on {x.device}")
    if x.stride(-1) != 1 and x.numel():
        raise ValueError(f"{name}: expected an inner stride of 1, got strides {x.stride()}")


def _check_angles(cos: Tensor, sin: Tensor, q: Tensor) -> None:
    shapes = [(len(q), q.shape[2] // 2), (len(q), q.shape[2])]
    for name, angles in (("cos", cos), ("sin", sin)):
        if not isinstance(angles, Tensor) or angles.dtype not in (torch.float32, q.dtype):
            expected = "float32" if q.dtype == torch.float32 else f"float32 or {q.dtype}"
            got = angles.dtype if isinstance(angles, Tensor) else type(angles).__name__
            raise TypeError(f"{name}: expected a {expected} tensor [S, D / 2] or [S, D], got {got}")
        if angles.shape not in shapes:
            raise ValueError(f"{name}: expected shape {list(shapes[0])} or {list(shapes[1])}, got {list(angles.shape)}")
        _check_rows(name, angles, angles.shape, q)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        both = f"{cos.dtype} {list(cos.shape)} and {sin.dtype} {list(sin.shape)}"
        raise ValueError(f"cos, sin: expected one shape and dtype, got {both}")
