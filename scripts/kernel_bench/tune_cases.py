"""The launch configs that `tune.py` measures, their candidates, and shapes of published towers to measure them on."""

import dataclasses
import itertools
from typing import Any

from kernel_bench.attention_cases import attention_case
from kernel_bench.cases import SIDES, Case
from kernel_bench.launch_configs import Knob, Shape
from kernel_bench.length_cases import length_case
from kernel_bench.pass_cases import MERGERS, activation_case, map_case, merger_case, norm_case
from kernel_bench.patch_cases import patch_case, positions_case
from kernel_bench.projection_cases import MLP, QKV, mlp_case, qkv_case
from kernel_bench.timing import Inputs
from peers.attention import split, triton_rope
from qwenvit import ops
from qwenvit.kernels.gemm import mlp, patch_embed, qkv_rope
from qwenvit.kernels.gemm import tiles as gemm

HEADS = 16
LARGE = (3136, 4096, 9216)
"""Patches of the images that tiles of products are chosen for."""


def of_case(case: Case, name: str = "qwenvit") -> Shape:
    size = f"S = {case.tokens}" + (f", D = {case.head_dim}" if case.head_dim else "")
    return Shape(f"{case.title}, {size}", case.inputs, case.ours[name].call)


def rotations(in_place: bool) -> tuple[Shape, ...]:
    """The pass in place; or the one before attention, with as little attention after it as there can be."""

    def attention(x: Inputs) -> Any:
        return ops.rope_attention(*split(x["turned"], HEADS), x["cos"], x["sin"], x["cu_seqlens"], interleaved=True)

    def place(x: Inputs) -> Any:
        return triton_rope(x["turned"], x["cos"], x["sin"], HEADS, True)[0]

    cases = [attention_case(14 * side, side, head_dim, True, {}) for side in (64, 96) for head_dim in (80, 72)]
    return tuple(
        Shape(f"S = {case.tokens}, D = {case.head_dim}", case.inputs, place if in_place else attention)
        for case in cases
    )


def products(tile: str, modules: tuple[str, ...] = ("qkv_rope", "mlp")) -> tuple[Shape, ...]:
    """The products with epilogues in plain Triton, with the tile of this name in `gemm`."""
    found = []
    for model, (channels, heads, head_dim, sizes) in QKV.items() if "qkv_rope" in modules else ():
        cases = [qkv_case(model, tokens, channels, heads, head_dim) for tokens in sizes if tokens in LARGE]
        names = ("x", "packed_weight", "packed_bias", "cos", "sin")

        def rotated(x: Inputs, names: tuple[str, ...] = names, heads: int = heads) -> Any:
            return qkv_rope.project_and_rotate(*(x[name] for name in names), heads, tile=getattr(gemm, tile))

        found += [dataclasses.replace(of_case(case, "fused"), call=rotated) for case in cases]
    for model, (act, channels, width, sizes) in MLP.items() if "mlp" in modules else ():
        cases = [mlp_case(model, act, tokens, channels, width) for tokens in sizes if tokens in LARGE]
        gated = act == "swiglu"
        names = ("x", "packed_weight", "packed_bias") if gated else ("x", "weight", "bias")

        def active(x: Inputs, names: tuple[str, ...] = names, act: str = act, gated: bool = gated) -> Any:
            operands = (x[name] for name in names)
            return mlp.project_and_activate(*operands, "silu" if gated else act, gated, tile=getattr(gemm, tile))

        found += [dataclasses.replace(of_case(case, "fused"), call=active) for case in cases]
    return tuple(found)


def ordered_patches(side: int) -> Shape:
    """The patch embedding's product, whose tile is an argument."""

    def call(x: Inputs) -> Any:
        return patch_embed.embed_to_order(x["pixels"], x["padded"], None, x["restore"], 4, patch_embed.PATCH_TILE)

    return dataclasses.replace(of_case(patch_case("Qwen2.5-VL", side, None)), call=call)


def grid(**fields: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """Every combination, as changes."""
    return tuple(dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values()))


def knobs(tma: bool = True) -> list[Knob]:
    """`tma`: whether the GPU has it, which decides the tile of matrix products that is in use."""
    windows = [attention_case(side, side // patch, head_dim, True, {})
               for head_dim, patch in ((80, 14), (72, 16)) for side in SIDES]  # fmt: skip
    images = [attention_case(side, side // patch, head_dim, False, {})
              for head_dim, patch in ((80, 14), (72, 16)) for side in (448, 672, 1344)]  # fmt: skip
    images += [length_case((tokens,), {}) for tokens in (256, 1024, 4096)]
    qkv = [qkv_case(model, tokens, *shape) for model, (*shape, sizes) in QKV.items() for tokens in sizes]
    halves = [mlp_case(model, act, tokens, *shape) for model, (act, *shape, sizes) in MLP.items() for tokens in sizes]
    patches = [patch_case(model, side, None) for model in ("Qwen2.5-VL", "Qwen3-VL") for side in SIDES]
    norms = [norm_case(kind, channels, residual, tokens) for kind, channels in (("rms", 1280), ("layer", 1152))
             for residual in (True, False) for tokens in (1024, 9216)]  # fmt: skip
    tile, tiles = ("TMA_TILE", TMA_CHANGES) if tma else ("POINTER_TILE", POINTER_CHANGES)
    either = (True, False)
    return [
        Knob("attention.window", "window_config", grid(heads=(1, 2, 4), num_stages=(2, 3)), shapes(windows)),
        Knob("attention.varlen", "varlen_config", VARLEN_CHANGES, tuple(of_case(case, "portable") for case in images)),
        Knob("attention.rotate", "ROTATE", grid(rows=(4, 8, 16), heads=(8, 16), num_warps=(4,)),
             rotations(in_place=False)),
        Knob("gemm.qkv_rope", "ROTATE_PASS", grid(rows=(2, 4, 8), pairs=(128, 256), num_warps=(4, 8)),
             rotations(in_place=True)),
        Knob("gemm.tiles", tile, tiles, products(tile)),
        Knob("gemm.qkv_rope", "group_of", (16, 32, 64), products(tile, ("qkv_rope",))),
        Knob("gemm.qkv_rope", "fused_is_faster", either, tuple(of_case(case, "dispatch") for case in qkv)),
        Knob("gemm.mlp", "fused_is_faster", either, tuple(of_case(case, "dispatch") for case in halves)),
        Knob("gemm.mlp", "GATE_PASS", grid(rows=(1, 2, 4), cols=(1024, 2048), num_warps=(4, 8)),
             shapes([activation_case("swiglu", 3456, tokens) for tokens in (4096, 9216)])),
        Knob("gemm.mlp", "ACTIVATION_PASS", grid(block=(1024, 2048, 4096, 8192), num_warps=(4, 8)),
             shapes([activation_case(act, 4304, tokens) for act in ("gelu_tanh", "gelu") for tokens in (4096, 9216)])),
        Knob("norm", "row_config", grid(num_warps=(1, 2, 4, 8)),
             shapes(norms + [merger_case(*merger, tokens) for merger in MERGERS for tokens in (1024, 9216)])),
        Knob("spatial_merge", "CONCAT_BLOCK", (512, 1024, 2048, 4096), shapes([map_case("concat", 1280, 9216)])),
        Knob("spatial_merge", "AVERAGE_BLOCK", (256, 512, 1024, 2048), shapes([map_case("average", 1280, 9216)])),
        Knob("gemm.patch_embed", "PASS_WARPS", (1, 2, 4),
             shapes([positions_case(1152, add, tokens) for add in either for tokens in (1024, 9216)])),
        *([Knob("gemm.patch_embed", "PATCH_TILE", TMA_CHANGES, tuple(map(ordered_patches, SIDES)))] if tma else []),
        Knob("gemm.patch_embed", "fused_is_faster", either, shapes(patches)),
    ]  # fmt: skip


def shapes(cases: list[Case]) -> tuple[Shape, ...]:
    return tuple(of_case(case) for case in cases)


TMA_CHANGES = (
    *grid(block_m=(128,), block_n=(128,), num_warps=(4,), num_stages=(3,), programs=(2,), band=(4, 8, 16)),
    *grid(block_m=(128,), block_n=(128,), num_warps=(8,), num_stages=(3, 4), programs=(1, 2)),
    *grid(block_m=(128,), block_n=(256,), num_warps=(8,), num_stages=(3, 4), programs=(1,)),
    *grid(block_m=(64,), block_n=(128,), num_warps=(4,), num_stages=(4,), programs=(2,)),
)
POINTER_CHANGES = grid(block_m=(64, 128), block_k=(32, 64), num_warps=(4, 8), num_stages=(3, 4))
VARLEN_CHANGES = (
    *grid(block_m=(64,), block_n=(64, 128), num_warps=(4,), num_stages=(3, 4), maxnreg=(None, 168)),
    *grid(block_m=(128,), block_n=(64, 128), num_warps=(8,), num_stages=(2, 3), maxnreg=(128,)),
)
"""`block_n` orders the sums of a segment: it may depend on dtype and head_dim, but not on what else is in the batch."""
