"""The launch settings that `tune.py` measures, each with its candidates and with workloads from published towers."""

import dataclasses
import itertools
from typing import Any

from common.kernel_inputs import Inputs
from kernel_bench.attention_cases import attention_case
from kernel_bench.cases import IMAGE_SIDES, Case
from kernel_bench.launch_configs import Tunable, Workload
from kernel_bench.length_cases import HEADS, length_case
from kernel_bench.pass_cases import MERGERS, activation_case, merger_case, norm_case, spatial_merge_case
from kernel_bench.patch_cases import positions_case
from kernel_bench.projection_cases import MLP_SHAPES, QKV_SHAPES, mlp_case, qkv_case
from peers.attention import split_qkv, triton_rope
from qwenvit import ops
from qwenvit.kernels.gemm import mlp, qkv_rope
from qwenvit.kernels.gemm import tiles as gemm
from qwenvit.ops.packing import value_width

LARGE_PATCH_COUNTS = (3136, 4096, 9216)
"""Patches of the images on which tiles of matrix products are measured."""


def workload_of(case: Case, implementation: str = "qwenvit") -> Workload:
    """Return one of the case's own implementations as a workload."""
    size = f"S = {case.tokens}" + (f", D = {case.head_dim}" if case.head_dim else "")
    return Workload(f"{case.title}, {size}", case.make_inputs, case.implementations[implementation].call)


def workloads_of(cases: list[Case]) -> tuple[Workload, ...]:
    return tuple(workload_of(case) for case in cases)


def rope_pass_workloads(in_place: bool) -> tuple[Workload, ...]:
    """Return workloads of a RoPE pass: the one in place, or the one before attention over long segments.

    The latter pass runs with attention. Segments are windows, which make attention as short as possible; without
    `max_seqlen` they are treated as long segments.
    """

    def rotate_and_attend(x: Inputs) -> Any:
        q, k, v = split_qkv(x["permuted_qkv"], HEADS)
        return ops.rope_attention(q, k, v, x["cos"], x["sin"], x["cu_seqlens"], interleaved=True)

    def rotate_in_place(x: Inputs) -> Any:
        return triton_rope(x["permuted_qkv"], x["cos"], x["sin"], HEADS, True)[0]

    call = rotate_in_place if in_place else rotate_and_attend
    cases = [attention_case(14 * side, side, head_dim, True, {}) for side in (64, 96) for head_dim in (80, 72)]
    return tuple(Workload(f"S = {case.tokens}, D = {case.head_dim}", case.make_inputs, call) for case in cases)


def fused_product_workloads(tile: str, modules: tuple[str, ...] = ("qkv_rope", "mlp")) -> tuple[Workload, ...]:
    """Return the fused products of these modules of `gemm`, with the tile of this name in `gemm.tiles`."""
    workloads = []
    for model, (channels, heads, head_dim, counts) in QKV_SHAPES.items() if "qkv_rope" in modules else ():
        large = [tokens for tokens in counts if tokens in LARGE_PATCH_COUNTS]
        cases = [qkv_case(model, tokens, channels, heads, head_dim) for tokens in large]
        names = ("x", "permuted_weight", "permuted_bias", "cos", "sin")

        def rotate(x: Inputs, names: tuple[str, ...] = names, heads: int = heads) -> Any:
            return qkv_rope.project_and_rotate(*(x[name] for name in names), heads, tile=getattr(gemm, tile))

        workloads += [dataclasses.replace(workload_of(case, "fused"), call=rotate) for case in cases]
    for model, (act, channels, width, counts) in MLP_SHAPES.items() if "mlp" in modules else ():
        large = [tokens for tokens in counts if tokens in LARGE_PATCH_COUNTS]
        cases = [mlp_case(model, act, tokens, channels, width) for tokens in large]
        gated = act == "swiglu"
        names = ("x", "packed_weight", "packed_bias") if gated else ("x", "weight", "bias")

        def activate(x: Inputs, names: tuple[str, ...] = names, act: str = act, gated: bool = gated) -> Any:
            operands = (x[name] for name in names)
            return mlp.project_and_activate(*operands, "silu" if gated else act, gated, tile=getattr(gemm, tile))

        workloads += [dataclasses.replace(workload_of(case, "fused"), call=activate) for case in cases]
    return tuple(workloads)


def combinations(**fields: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """Return every combination of these values of fields."""
    return tuple(dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values()))


TMA_TILES = (
    *combinations(block_m=(128,), block_n=(128,), num_warps=(4,), num_stages=(3,), programs=(2,), band=(4, 8, 16)),
    *combinations(block_m=(128,), block_n=(128,), num_warps=(8,), num_stages=(3, 4), programs=(1, 2)),
    *combinations(block_m=(128,), block_n=(256,), num_warps=(8,), num_stages=(3, 4), programs=(1,)),
    *combinations(block_m=(64,), block_n=(128,), num_warps=(4,), num_stages=(4,), programs=(2,)),
)
POINTER_TILES = combinations(block_m=(64, 128), block_k=(32, 64), num_warps=(4, 8), num_stages=(3, 4))
VARLEN_CONFIGS = (
    *combinations(block_m=(64,), block_n=(64, 128), num_warps=(4,), num_stages=(3, 4), maxnreg=(None, 168)),
    *combinations(block_m=(128,), block_n=(64, 128), num_warps=(8,), num_stages=(2, 3), maxnreg=(128,)),
)
"""`block_n` orders the sums of a segment. It may depend on dtype and head_dim, but not on what else is in the batch."""


def tunables(tma: bool = True) -> list[Tunable]:
    """Return all launch settings. `tma` says whether matrix products load tiles by TMA, which they do from sm_90."""
    windows = [attention_case(side, side // patch_size, head_dim, True, {})
               for head_dim, patch_size in ((80, 14), (72, 16)) for side in IMAGE_SIDES]  # fmt: skip
    images = [attention_case(side, side // patch_size, head_dim, False, {})
              for head_dim, patch_size in ((80, 14), (72, 16)) for side in (448, 672, 1344)]  # fmt: skip
    images += [length_case((tokens,), {}) for tokens in (256, 1024, 4096)]
    qkv = [qkv_case(model, tokens, *shape) for model, (*shape, counts) in QKV_SHAPES.items() for tokens in counts]
    mlps = [mlp_case(model, act, tokens, *shape)
            for model, (act, *shape, counts) in MLP_SHAPES.items() for tokens in counts]  # fmt: skip
    norms = [norm_case(kind, channels, residual, tokens) for kind, channels in (("rms", 1280), ("layer", 1152))
             for residual in (True, False) for tokens in (1024, 9216)]  # fmt: skip
    mergers = [merger_case(*merger, tokens) for merger in MERGERS for tokens in (1024, 9216)]
    gates = [activation_case("swiglu", 3456, tokens) for tokens in (4096, 9216)]
    activations = [activation_case(act, 4304, tokens) for act in ("gelu_tanh", "gelu") for tokens in (4096, 9216)]
    positions = [positions_case(1152, add, tokens) for add in (True, False) for tokens in (1024, 9216)]
    tile, tiles = ("TMA_TILE", TMA_TILES) if tma else ("POINTER_TILE", POINTER_TILES)
    return [
        Tunable("attention.window", "window_config", combinations(heads=(1, 2, 4), num_stages=(2, 3)),
                workloads_of(windows)),
        Tunable("attention.varlen", "varlen_config", VARLEN_CONFIGS,
                tuple(workload_of(case, "portable") for case in images)),
        Tunable("attention.rotate", "ROTATE", combinations(rows=(4, 8, 16), heads=(8, 16), num_warps=(4,)),
                rope_pass_workloads(in_place=False)),
        Tunable("gemm.qkv_rope", "ROTATE_PASS", combinations(rows=(2, 4, 8), pairs=(128, 256), num_warps=(4, 8)),
                rope_pass_workloads(in_place=True)),
        Tunable("gemm.tiles", tile, tiles, fused_product_workloads(tile)),
        Tunable("gemm.qkv_rope", "channel_group", (16, 32, 64), fused_product_workloads(tile, ("qkv_rope",))),
        Tunable("gemm.qkv_rope", "is_fused", (True, False),
                tuple(workload_of(case, "dispatch") for case in qkv if value_width(case.head_dim) == case.head_dim)),
        Tunable("gemm.mlp", "is_fused", (True, False), tuple(workload_of(case, "dispatch") for case in mlps)),
        Tunable("gemm.mlp", "GATE_PASS", combinations(rows=(1, 2, 4), cols=(1024, 2048), num_warps=(4, 8)),
                workloads_of(gates)),
        Tunable("gemm.mlp", "ACTIVATION_PASS", combinations(block=(1024, 2048, 4096, 8192), num_warps=(4, 8)),
                workloads_of(activations)),
        Tunable("norm", "row_config", combinations(num_warps=(1, 2, 4, 8)), workloads_of(norms + mergers)),
        Tunable("spatial_merge", "CONCAT_BLOCK", (512, 1024, 2048, 4096),
                workloads_of([spatial_merge_case("concat", 1280, 9216)])),
        Tunable("spatial_merge", "AVERAGE_BLOCK", (256, 512, 1024, 2048),
                workloads_of([spatial_merge_case("average", 1280, 9216)])),
        Tunable("gemm.patch_embed", "PASS_WARPS", (1, 2, 4), workloads_of(positions)),
    ]  # fmt: skip
