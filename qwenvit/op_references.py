"""The operations of `qwenvit.ops` in plain torch: what each means, on any device, at no particular speed."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenvit.rope import apply_rope


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if not interleaved:
        return apply_rope(x, cos, sin)
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # pairs (2i, 2i + 1) to (i, i + D / 2)
    return apply_rope(halves, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """Rotation in fp32, rounded to the tensors' dtype; then attention, segment by segment.

    Raises:
        ValueError: `cu_seqlens` does not rise from 0 to the number of tokens.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != len(q) or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to {len(q)}, got {bounds}")
    if cos is not None and sin is not None:
        q, k = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start, end in pairwise(bounds):
        if end > start:
            own_q, own_k, own_v = (x[None, start:end].transpose(1, 2) for x in (q, k, v))
            out[start:end] = F.scaled_dot_product_attention(own_q, own_k, own_v, scale=scale)[0].transpose(0, 1)
    return out
