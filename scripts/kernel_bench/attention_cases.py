"""Cases of RoPE and attention over one image: whole, or in windows."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from common.kernel_inputs import Inputs
from kernel_bench.cases import ELEMENT_BYTES, IMAGE_SIDES, Case, Implementation, Target, add_copy_bound, normal
from kernel_bench.length_cases import (
    HEADS,
    SEGMENT_LENGTHS,
    SEQUENCE_LENGTHS,
    attention_fp64,
    length_case,
    portable_attention,
)
from peers.attention import Attention, split_qkv, torch_rope, triton_rope
from qwenvit import ops
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.packing import adjacent_pairs
from qwenvit.plan.grid_plan import GridPlan

PATCH_SIZES = (14, 16)
"""Sides of a patch in pixels. The images have 1024, 2304, 4096, 9216 and 784, 1764, 3136, 7056 patches."""
MODEL_BY_HEAD_DIM = {80: "Qwen2.5-VL", 72: "Qwen3-VL", 64: "Qwen3-VL small"}
TORCH_ROPE, TRITON_ROPE = "torch RoPE", "Triton RoPE"


@functools.cache
def square_image_plan(patches: int, head_dim: int, heads: int = HEADS) -> GridPlan:
    """Return the plan of one square image of `patches` × `patches`, with windows of 8 × 8 patches."""
    config = VisionConfig(
        "qwen2_5_vl", 32, heads * head_dim, 3456, heads, 3584, "silu", 14,
        window_size=112, fullatt_block_indexes=(7,), tokens_per_second=2,
    )  # fmt: skip
    return GridPlan.build([[1, patches, patches]], config)


def rope_fp64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D / 2) of fp64 `[S, H, D]`."""
    first, second = x.chunk(2, -1)
    cos, sin = (angles[:, None, : first.shape[-1]].double() for angles in (cos, sin))
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotate_pass_bytes(tokens: int, heads: int, head_dim: int) -> int:
    """Return the bytes moved by the pass before attention over long segments, which rotates and groups by head.

    The pass writes heads of 64 or 80 channels. It copies the values too where a row of a head is no multiple of 32
    bytes.
    """
    tensors = 3 if head_dim * ELEMENT_BYTES % 32 else 2
    return tensors * tokens * heads * (head_dim + (64 if head_dim == 64 else 80)) * ELEMENT_BYTES


def attention_case(
    side: int, patches: int, head_dim: int, windows: bool, libraries: dict[str, Attention], interleaved: bool = True,
    heads: int = HEADS,
) -> Case:  # fmt: skip
    """Return the case of RoPE and attention over one image of `side`² pixels and `patches`² patches.

    With `interleaved`, qwenvit rotates channel pairs (2i, 2i + 1) of permuted Q and K, otherwise (i, i + D / 2).
    """
    plan = square_image_plan(patches, head_dim, heads)
    segments = plan.windows if windows else plan.frames
    tokens, max_seqlen = plan.num_patches, segments.max_seqlen
    equal_lengths = len(segments.groups) == 1

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        qkv = normal(tokens, 3 * heads * head_dim, device=device, dtype=dtype)
        permuted_qkv = qkv[:, adjacent_pairs(heads, head_dim, device)] if interleaved else qkv.clone()
        angles = {name: getattr(plan, name).to(device, copy=True) for name in ("cos", "sin")}
        cu_seqlens = segments.cu_seqlens.to(device, copy=True)
        return {"qkv": qkv, "permuted_qkv": permuted_qkv, "cu_seqlens": cu_seqlens} | angles

    def run_qwenvit(x: Inputs, impl: str = "auto", attend: Callable[..., Tensor] = ops.rope_attention) -> Tensor:
        q, k, v = split_qkv(x["permuted_qkv"], heads)
        return attend(q, k, v, x["cos"], x["sin"], x["cu_seqlens"], max_seqlen, None, interleaved, impl)

    def truth(x: Inputs) -> Tensor:
        q, k, v = split_qkv(x["qkv"].double(), heads)
        return attention_fp64(rope_fp64(q, x["cos"], x["sin"]), rope_fp64(k, x["cos"], x["sin"]), v, segments)

    def rival(rope: str, attend: Attention) -> Implementation:
        def call(x: Inputs) -> Tensor:
            if rope == TORCH_ROPE:
                q, k, v = torch_rope(x["qkv"], x["cos"], x["sin"], heads)
            else:
                q, k, v = triton_rope(x["permuted_qkv"], x["cos"], x["sin"], heads, interleaved)
            return attend(q, k, v, x["cu_seqlens"], max_seqlen)

        return Implementation(call)

    implementations = {"qwenvit": Implementation(run_qwenvit)}
    if not windows:
        implementations["portable"] = Implementation(functools.partial(run_qwenvit, attend=portable_attention))
    lengths = segments.cu_seqlens.diff().long()
    qkv_and_output = 4 * tokens * heads * head_dim * ELEMENT_BYTES
    angles = 4 * tokens * head_dim  # fp32; the second half of each row repeats the first and need not be read
    case = Case(
        section="windows" if windows else "full",
        series=f"head_dim {head_dim}" + ("" if interleaved else ", halves"),
        title=f"{MODEL_BY_HEAD_DIM[head_dim]}, {side}²" + ("" if interleaved else ", pairs as halves"),
        tokens=tokens,
        head_dim=head_dim,
        make_inputs=make_inputs,
        implementations=implementations,
        rivals={
            f"{rope} + {name}": rival(rope, attend)
            for rope in (TORCH_ROPE, TRITON_ROPE)
            for name, attend in libraries.items()
            if equal_lengths or name != "cuDNN"
        },
        truth=truth,
        baseline=Implementation(functools.partial(run_qwenvit, impl="reference")),
        minimum_bytes=qkv_and_output + angles + segments.cu_seqlens.nbytes,
        pass_bytes={"_rotate_by_head": rotate_pass_bytes(tokens, heads, head_dim)},
        flops=4 * int((lengths**2).sum()) * heads * head_dim,
        targets={
            name: _targets(name, tokens, head_dim, windows, interleaved, tuple(libraries)) for name in implementations
        },
    )
    return add_copy_bound(case) if windows else case


def _targets(
    implementation: str, tokens: int, head_dim: int, windows: bool, interleaved: bool, libraries: tuple[str, ...]
) -> tuple[Target, ...]:
    if not interleaved:
        return ()
    if not windows:
        rival = f"{TRITON_ROPE} + cuDNN"
        target = Target(f"over {rival}", lambda m: m.speedup(implementation, rival), 1.0)
        return (target,) if head_dim in (72, 80) else ()
    targets: tuple[Target, ...] = ()
    if head_dim == 80 and tokens == 1024:
        targets = (Target("time", lambda m: m.seconds["qwenvit"] * 1e6, 9.0, at_most=True, unit=" µs"),)
    if head_dim == 80 and tokens in (4096, 9216):
        limit = 2.1 if tokens == 4096 else 1.7
        targets = (Target("of one pass", lambda m: m.seconds["qwenvit"] / m.copy_seconds, limit, at_most=True),)
    if head_dim == 80 and tokens == 9216:
        rivals = [f"{TRITON_ROPE} + {name}" for name in libraries]
        targets += (Target(f"over {TRITON_ROPE} + best", lambda m: m.speedup("qwenvit", *rivals), 2.2),)
    return targets


def attention_cases(libraries: dict[str, Attention]) -> list[Case]:
    """Return the cases of the sections `windows`, `full`, `lengths` and `segments`, with these rivals by name."""
    cases = []
    for windows in (True, False):
        for head_dim in MODEL_BY_HEAD_DIM:
            for patch_size in PATCH_SIZES:
                cases += [
                    attention_case(side, side // patch_size, head_dim, windows, libraries) for side in IMAGE_SIDES
                ]
    cases += [attention_case(side, side // 14, 80, True, libraries, interleaved=False) for side in IMAGE_SIDES]
    cases += [length_case((tokens,), libraries) for tokens in SEQUENCE_LENGTHS]
    for head_dim in MODEL_BY_HEAD_DIM:
        for lengths in SEGMENT_LENGTHS:
            longest = f" to {max(lengths)}" if max(lengths) > min(lengths) else ""
            title = "one segment" if len(lengths) == 1 else f"{len(lengths)} segments of {min(lengths)}{longest}"
            cases.append(length_case(lengths, libraries, head_dim, section="segments", title=title))
    return cases
