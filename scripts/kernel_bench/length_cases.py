"""Cases of attention alone, over one sequence and over segments of many lengths."""

import functools
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor

from kernel_bench.cases import ITEM, Bar, Case, Run, normal
from kernel_bench.timing import Inputs
from peers.attention import Attention, split
from qwenvit import ops
from qwenvit.kernels.attention import dispatch
from qwenvit.plan.grid_plan import Segments

HEADS = 16
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SEGMENTS = (
    *((tokens,) for tokens in (1024, 1764, 2304, 3136, 4096, 7056, 9216, 15376, 24336)),
    (1024,) * 16,
    tuple(4 + 7919 * i % 1997 for i in range(40)),
)
"""Lengths of the segments that attention over long ones is measured at."""
CONTENDERS = ("qwenvit", "portable")
"""What `ops.rope_attention` chooses on this GPU, and what it chooses on GPUs other than Hopper."""


def portable(*arguments: object, **options: object) -> Tensor:
    """`ops.rope_attention` as GPUs other than Hopper run it."""
    with mock.patch.object(dispatch, "runs_hopper", return_value=False):
        return ops.rope_attention(*arguments, **options)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """In fp64, a head at a time."""
    out = torch.full_like(q, torch.nan)
    for head in range(q.shape[1]):
        for _, patches in segments.groups:
            own_q, own_k, own_v = (x[:, head][patches.to(x.device)] for x in (q, k, v))
            scores = own_q @ own_k.mT * q.shape[2] ** -0.5
            out[patches.to(q.device), head] = scores.softmax(-1) @ own_v
    return out


def segments_of(lengths: Sequence[int]) -> Segments:
    """Segments of these lengths, one after another."""
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
    """Attention alone over segments of these lengths."""
    segments, tokens = segments_of(lengths), sum(lengths)
    cu_seqlens, longest = segments.cu_seqlens, segments.max_seqlen

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        qkv = normal(tokens, 3 * heads * head_dim, device=device, dtype=dtype)
        return {"qkv": qkv, "cu_seqlens": cu_seqlens.to(device, copy=True)}

    def ours(x: Inputs, impl: str = "auto", attend: Callable[..., Tensor] = ops.rope_attention) -> Tensor:
        return attend(*split(x["qkv"], heads), None, None, x["cu_seqlens"], longest, impl=impl)

    def bars(ours: str) -> tuple[Bar, ...]:
        if section == "lengths":
            return (Bar("over cuDNN", lambda f: f.over(ours, "cuDNN"), 0.9),)
        if ours != "qwenvit" or "FA3" not in libraries:
            return ()
        one = len(lengths) == 1
        bar = 1.15 if not one else 1.0 if tokens > 7056 or head_dim == 64 else 1.03 if tokens > 1764 else 1.3
        over_fa3 = (Bar("over FA3", lambda f: f.over(ours, "FA3"), bar),) if head_dim > 64 or tokens >= 4096 else ()
        whole = len(segments.groups) == 1
        return over_fa3 + ((Bar("over cuDNN", lambda f: f.over(ours, "cuDNN"), 1.05),) if whole else ())

    return Case(
        section=section,
        series=f"head_dim {head_dim}",
        title=title,
        tokens=tokens,
        head_dim=head_dim,
        inputs=inputs,
        ours={"qwenvit": Run(ours), "portable": Run(functools.partial(ours, attend=portable))},
        rivals={
            name: Run(lambda x, attend=attend: attend(*split(x["qkv"], heads), x["cu_seqlens"], longest))
            for name, attend in libraries.items()
            if len(segments.groups) == 1 or name != "cuDNN"
        },
        truth=lambda x: exact_attention(*split(x["qkv"].double(), heads), segments),
        stick=Run(functools.partial(ours, impl="reference")),
        fewest_bytes=4 * tokens * heads * head_dim * ITEM + cu_seqlens.nbytes,
        flops=4 * sum(length**2 for length in lengths) * heads * head_dim,
        bars={name: bars(name) for name in CONTENDERS},
    )


def segments_case(lengths: Sequence[int], libraries: dict[str, Attention], head_dim: int) -> Case:
    """`length_case` of one of `SEGMENTS`."""
    title = "one segment" if len(lengths) == 1 else f"{len(lengths)} segments of {min(lengths)} to {max(lengths)}"
    return length_case(lengths, libraries, head_dim, section="segments", title=title)
