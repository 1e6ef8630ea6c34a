"""Cases of attention alone, over one sequence or over segments of given lengths."""

import functools
from collections.abc import Callable, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernel_inputs import Inputs
from kernel_bench.cases import ELEMENT_BYTES, Case, Implementation, Target, normal
from peers.attention import Attention, fa4, fa4_dense, split_qkv
from qwenvit import ops
from qwenvit.kernels.attention import dispatch
from qwenvit.ops.packing import split_packed_qkv, value_width
from qwenvit.plan.grid_plan import Segments

HEADS = 16
SEQUENCE_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SEGMENT_LENGTHS = (
    *((tokens,) for tokens in (1024, 1764, 2304, 3136, 4096, 7056, 9216, 15376, 24336)),
    (1024,) * 16,
    tuple(4 + 7919 * i % 1997 for i in range(40)),
)
"""Lengths of the segments of each case in the section `segments`."""
FA4_LENGTHS = (
    *((tokens,) for tokens in (1024, 1764, 3136, 4096, 7056, 9216, 15376, 24336)),
    (1024,) * 16,
)
"""Those whose speed over FlashAttention 4 has a limit, at every head_dim."""
OVER_FA4 = "over FA4"
"""Text of that target. The speed is over the fastest of FlashAttention 4's ways to run."""


def portable_attention(*arguments: object, **options: object) -> Tensor:
    """Run `ops.rope_attention` as on GPUs other than Hopper."""
    with mock.patch.object(dispatch, "runs_hopper", return_value=False):
        return ops.rope_attention(*arguments, **options)


def plain_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
    """Run the operation's reference."""
    return ops.rope_attention(q, k, v, None, None, cu_seqlens, max_seqlen, impl="reference")


def attention_fp64(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attend within segments, one head at a time; q, k, v and the result are fp64 `[S, H, D]`."""
    out = torch.full_like(q, torch.nan)
    for head in range(q.shape[1]):
        for _, patches in segments.groups:
            group_q, group_k, group_v = (x[:, head][patches.to(x.device)] for x in (q, k, v))
            scores = group_q @ group_k.mT * q.shape[2] ** -0.5
            out[patches.to(q.device), head] = scores.softmax(-1) @ group_v
    return out


def build_segments(lengths: Sequence[int]) -> Segments:
    """Return segments of these lengths, one after another."""
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    groups = tuple(
        (size, (ends - sizes)[sizes == size][:, None] + torch.arange(size)) for size in sizes.unique().tolist() if size
    )
    return Segments(torch.cat((torch.zeros(1), ends)).int(), max(lengths), groups)


def length_case(
    lengths: Sequence[int], libraries: dict[str, Attention], head_dim: int = 64, heads: int = HEADS,
    section: str = "lengths", title: str = "attention alone",
) -> Case:  # fmt: skip
    """Return the case of attention alone over segments of these lengths.

    All read Q, K and V from a packed projection. Ours gets it as in the fast tower, where heads of V of 72 channels
    have ones beside them (`pack_qkv`).
    """
    segments, tokens = build_segments(lengths), sum(lengths)
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    equal_lengths = len(segments.groups) == 1

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        qkv = normal(tokens, 3 * heads * head_dim, device=device, dtype=dtype)
        inputs = {"qkv": qkv, "cu_seqlens": cu_seqlens.to(device, copy=True)}
        if value_width(head_dim) > head_dim:
            inputs["tower_qkv"] = with_ones(qkv)
        return inputs | ({"contiguous": torch.stack(split_qkv(qkv, heads))} if "FA4" in libraries else {})

    def with_ones(qkv: Tensor) -> Tensor:
        q, k, v = split_qkv(qkv, heads)
        v = F.pad(v, (0, value_width(head_dim) - head_dim), value=1.0)
        return torch.cat([x.flatten(1) for x in (q, k, v)], 1)

    def run_qwenvit(x: Inputs, impl: str = "auto", attend: Callable[..., Tensor] = ops.rope_attention) -> Tensor:
        packed = x["tower_qkv" if "tower_qkv" in x else "qkv"]
        operands = split_packed_qkv(packed, heads, head_dim)
        return attend(*operands, None, None, x["cu_seqlens"], max_seqlen, impl=impl)

    def targets(name: str) -> tuple[Target, ...]:
        if section == "lengths":
            return (Target("over cuDNN", lambda m: m.speedup(name, "cuDNN"), 0.9),)
        if name != "qwenvit":
            return ()
        found: tuple[Target, ...] = ()
        if "FA4" in rivals and tuple(lengths) in FA4_LENGTHS:
            forms = [rival for rival in rivals if rival.startswith("FA4")]
            found += (Target(OVER_FA4, lambda m: m.speedup(name, *forms), 1.0),)
        if "FA3" in rivals and (head_dim > 64 or tokens >= 4096):
            found += (Target("over FA3", lambda m: m.speedup(name, "FA3"), _fa3_limit(lengths, head_dim)),)
        if "cuDNN" in rivals:
            found += (Target("over cuDNN", lambda m: m.speedup(name, "cuDNN"), 1.05),)
        return found

    def rival(attend: Attention, contiguous: bool = False) -> Implementation:
        def call(x: Inputs) -> Tensor:
            q, k, v = x["contiguous"].unbind() if contiguous else split_qkv(x["qkv"], heads)
            return attend(q, k, v, x["cu_seqlens"], max_seqlen)

        return Implementation(call)

    rivals = {name: rival(attend) for name, attend in libraries.items() if equal_lengths or name != "cuDNN"}
    if "FA4" in libraries:
        rivals["FA4 contiguous"] = rival(fa4, contiguous=True)
        if equal_lengths:
            rivals["FA4 dense"] = rival(fa4_dense, contiguous=True)

    implementations = {
        "qwenvit": Implementation(run_qwenvit),
        "portable": Implementation(functools.partial(run_qwenvit, attend=portable_attention)),
    }
    return Case(
        section=section,
        series=f"head_dim {head_dim}",
        title=title,
        tokens=tokens,
        head_dim=head_dim,
        make_inputs=make_inputs,
        implementations=implementations,
        rivals=rivals,
        truth=lambda x: attention_fp64(*split_qkv(x["qkv"].double(), heads), segments),
        baseline=rival(plain_torch),
        minimum_bytes=4 * tokens * heads * head_dim * ELEMENT_BYTES + cu_seqlens.nbytes,
        flops=4 * sum(length**2 for length in lengths) * heads * head_dim,
        targets={name: targets(name) for name in implementations},
    )


def _fa3_limit(lengths: Sequence[int], head_dim: int) -> float:
    """Return the speed to reach over FlashAttention 3."""
    if len(lengths) > 1:
        return 1.15
    (tokens,) = lengths
    if tokens > 7056 or head_dim == 64:
        return 1.0
    return 1.03 if tokens > 1764 else 1.3
