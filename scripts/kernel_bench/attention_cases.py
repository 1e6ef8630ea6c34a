"""Cases of RoPE and attention: windows and whole images; attention alone is in `length_cases`."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernel_bench.cases import ITEM, SIDES, Bar, Case, Run, normal, with_copy
from kernel_bench.length_cases import CONTENDERS, HEADS, LENGTHS, SEGMENTS, exact_attention, length_case, portable
from kernel_bench.timing import Inputs
from peers.attention import Attention, cudnn, fa2, fa3, split, torch_rope, triton_rope
from qwenvit import ops
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.packing import adjacent_pairs
from qwenvit.plan.grid_plan import GridPlan

PATCHES = (14, 16)
"""Pixels along a patch: 1024, 2304, 4096, 9216 patches and 784, 1764, 3136, 7056."""
MODELS = {80: "Qwen2.5-VL", 72: "Qwen3-VL", 64: "Qwen3-VL small"}
"""Whose head_dim it is."""
TORCH, TRITON = "torch RoPE", "Triton RoPE"
ROTARY = (TORCH, TRITON)


@functools.cache
def plan_of(patches: int, head_dim: int, heads: int = HEADS) -> GridPlan:
    """Of a square image of so many patches along a side, in windows of 8 × 8 patches."""
    config = VisionConfig(
        "qwen2_5_vl", 32, heads * head_dim, 3456, heads, 3584, "silu", 14,
        window_size=112, fullatt_block_indexes=(7,), tokens_per_second=2,
    )  # fmt: skip
    return GridPlan.build([[1, patches, patches]], config)


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + D / 2), in fp64."""
    first, second = x.chunk(2, -1)
    cos, sin = (angles[:, None, : first.shape[-1]].double() for angles in (cos, sin))
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def layout_bytes(tokens: int, heads: int, head_dim: int) -> int:
    """What the pass before attention over long segments reads and writes: rotated, and laid out by head."""
    tensors = 3 if head_dim * ITEM % 32 else 2
    return tensors * tokens * heads * (head_dim + (64 if head_dim == 64 else 80)) * ITEM


def attention_case(
    side: int, patches: int, head_dim: int, windows: bool, libraries: dict[str, Attention], interleaved: bool = True,
    heads: int = HEADS,
) -> Case:  # fmt: skip
    """RoPE and attention over one square image, `patches` along its side."""
    plan = plan_of(patches, head_dim, heads)
    segments = plan.windows if windows else plan.frames
    tokens, longest = plan.num_patches, segments.max_seqlen
    whole = len(segments.groups) == 1

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        qkv = normal(tokens, 3 * heads * head_dim, device=device, dtype=dtype)
        turned = qkv[:, adjacent_pairs(heads, head_dim, device)] if interleaved else qkv.clone()
        angles = {name: getattr(plan, name).to(device, copy=True) for name in ("cos", "sin")}
        return {"qkv": qkv, "turned": turned, "cu_seqlens": segments.cu_seqlens.to(device, copy=True)} | angles

    def ours(x: Inputs, impl: str = "auto", attend: Callable[..., Tensor] = ops.rope_attention) -> Tensor:
        q, k, v = split(x["turned"], heads)
        return attend(q, k, v, x["cos"], x["sin"], x["cu_seqlens"], longest, None, interleaved, impl)

    def truth(x: Inputs) -> Tensor:
        q, k, v = split(x["qkv"].double(), heads)
        return exact_attention(exact_rope(q, x["cos"], x["sin"]), exact_rope(k, x["cos"], x["sin"]), v, segments)

    def rival(rope: str, attend: Attention) -> Run:
        def call(x: Inputs) -> Tensor:
            if rope == TORCH:
                q, k, v = torch_rope(x["qkv"], x["cos"], x["sin"], heads)
            else:
                q, k, v = triton_rope(x["turned"], x["cos"], x["sin"], heads, interleaved)
            return attend(q, k, v, x["cu_seqlens"], longest)

        return Run(call)

    lengths = segments.cu_seqlens.diff().long()
    fewest = 4 * tokens * heads * head_dim * ITEM + 4 * tokens * head_dim + segments.cu_seqlens.nbytes
    case = Case(
        section="windows" if windows else "full",
        series=f"head_dim {head_dim}" + ("" if interleaved else ", halves"),
        title=f"{MODELS[head_dim]}, {side}²" + ("" if interleaved else ", pairs as halves"),
        tokens=tokens,
        head_dim=head_dim,
        inputs=inputs,
        ours={"qwenvit": Run(ours)} | ({} if windows else {"portable": Run(functools.partial(ours, attend=portable))}),
        rivals={
            f"{rope} + {name}": rival(rope, attend)
            for rope in ROTARY
            for name, attend in libraries.items()
            if whole or name != "cuDNN"
        },
        truth=truth,
        stick=Run(functools.partial(ours, impl="reference")),
        fewest_bytes=fewest,
        pass_bytes={"_rotate_by_head": layout_bytes(tokens, heads, head_dim)},
        flops=4 * int((lengths**2).sum()) * heads * head_dim,
        bars={name: _bars(name, tokens, head_dim, windows, interleaved, tuple(libraries)) for name in CONTENDERS},
    )
    return with_copy(case) if windows else case


def _bars(
    ours: str, tokens: int, head_dim: int, windows: bool, interleaved: bool, names: tuple[str, ...]
) -> tuple[Bar, ...]:
    if not interleaved:
        return ()
    if not windows:
        bar = Bar("over Triton RoPE + cuDNN", lambda f: f.over(ours, f"{TRITON} + cuDNN"), 1.0)
        return (bar,) if head_dim in (72, 80) else ()
    bars: tuple[Bar, ...] = ()
    if head_dim == 80 and tokens == 1024:
        bars = (Bar("time", lambda f: f.seconds["qwenvit"] * 1e6, 9.0, at_most=True, unit=" µs"),)
    if head_dim == 80 and tokens in (4096, 9216):
        limit = 2.1 if tokens == 4096 else 1.7
        bars = (Bar("of one pass", lambda f: f.seconds["qwenvit"] / f.one_pass, limit, at_most=True),)
    if head_dim == 80 and tokens == 9216:
        rivals = [f"{TRITON} + {name}" for name in names]
        bars += (Bar("over Triton RoPE + best", lambda f: f.over("qwenvit", *rivals), 2.2),)
    return bars


def attention_cases(fa3_library: Path | None) -> list[Case]:
    libraries: dict[str, Attention] = {"cuDNN": cudnn, "FA2": fa2}
    if fa3_library is not None:
        libraries["FA3"] = fa3
    cases = []
    for windows in (True, False):
        for head_dim in MODELS:
            for patch in PATCHES:
                cases += [attention_case(side, side // patch, head_dim, windows, libraries) for side in SIDES]
    cases += [attention_case(side, side // 14, 80, True, libraries, interleaved=False) for side in SIDES]
    cases += [length_case((tokens,), libraries) for tokens in LENGTHS]
    for head_dim in MODELS:
        for lengths in SEGMENTS:
            title = (
                "one segment" if len(lengths) == 1 else f"{len(lengths)} segments of {min(lengths)} to {max(lengths)}"
            )
            cases.append(length_case(lengths, libraries, head_dim, section="segments", title=title))
    return cases
