"""Launch configs that `tune.py` can measure, their candidates, and shapes of published towers to measure them on."""

import contextlib
import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from attention_cases import attention_case, length_case
from kernel_baselines import split, triton_rope
from kernel_cases import SIDES, Case
from kernel_timing import Inputs
from pass_cases import MERGERS, activation_case, map_case, merger_case, norm_case
from patch_cases import patch_case, positions_case
from projection_cases import MLP, QKV, mlp_case, qkv_case

from qwenvit import kernels, ops

HEADS = 16


@dataclass(frozen=True)
class Shape:
    """Something to run on which a launch config has influence."""

    title: str
    inputs: Callable[[torch.device, torch.dtype], Inputs]
    call: Callable[[Inputs], Any]


@dataclass(frozen=True)
class Knob:
    """A launch config: a constant of a module in `qwenvit.kernels`, or a function there that chooses one."""

    module: str
    name: str
    candidates: tuple[Any, ...]
    """Values; or, as dicts, what to change in the value there is now."""
    shapes: tuple[Shape, ...]

    @property
    def title(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def current(self) -> Any:
        return getattr(importlib.import_module(f"{kernels.__name__}.{self.module}"), self.name)

    @property
    def is_function(self) -> bool:
        return callable(self.current)


def modules() -> list[ModuleType]:
    return [
        importlib.import_module(f"{kernels.__name__}.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)
    ]


@contextlib.contextmanager
def configured(knob: Knob, candidate: Any) -> Iterator[list[Any]]:
    """Put a candidate in the place of the config, in every module that imported it; None leaves it, and looks.

    Yields:
        A list that the configs in use are added to.
    """
    current, seen = knob.current, []

    def value(now: Any) -> Any:
        new = now if candidate is None else candidate
        seen.append(dataclasses.replace(now, **new) if isinstance(new, dict) else new)
        return seen[-1]

    new = (lambda *args, **options: value(current(*args, **options))) if knob.is_function else value(current)
    with contextlib.ExitStack() as stack:
        for module in modules():
            if getattr(module, knob.name, None) is current:
                stack.enter_context(mock.patch.object(module, knob.name, new))
        yield seen


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


def ordered_patches(side: int) -> Shape:
    """The patch embedding's product, whose tile is an argument."""
    from qwenvit.kernels import patch_embed

    def call(x: Inputs) -> Any:
        return patch_embed.embed_to_order(x["pixels"], x["padded"], None, x["restore"], 4, patch_embed.TILE)

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
    images += [length_case(tokens, {}) for tokens in (256, 1024, 4096)]
    qkv = [qkv_case(model, tokens, *shape) for model, (*shape, sizes) in QKV.items() for tokens in sizes]
    mlp = [mlp_case(model, act, tokens, *shape) for model, (act, *shape, sizes) in MLP.items() for tokens in sizes]
    patches = [patch_case(model, side, None) for model in ("Qwen2.5-VL", "Qwen3-VL") for side in SIDES]
    norms = [norm_case(kind, channels, residual, tokens) for kind, channels in (("rms", 1280), ("layer", 1152))
             for residual in (True, False) for tokens in (1024, 9216)]  # fmt: skip
    large = [case for case in qkv + mlp if case.tokens in (3136, 4096, 9216)]
    products = tuple(of_case(case, "fused") for case in large)
    tile, tiles = ("TMA_TILE", TMA_CHANGES) if tma else ("POINTER_TILE", POINTER_CHANGES)
    passes = [activation_case(act, columns, tokens) for act, columns in (("swiglu", 3456), ("gelu_tanh", 4304))
              for tokens in (4096, 9216)]  # fmt: skip
    either = (True, False)
    return [
        Knob("rope_attention", "window_config", grid(heads=(1, 2, 4), num_stages=(2, 3)), shapes(windows)),
        Knob("long_attention", "long_config", LONG_CHANGES, shapes(images)),
        Knob("rope", "ROTATE", grid(rows=(4, 8, 16), heads=(8, 16), num_warps=(4,)), rotations(in_place=False)),
        Knob("qkv_rope", "PASS", grid(rows=(2, 4, 8), pairs=(128, 256), num_warps=(4, 8)), rotations(in_place=True)),
        Knob("gemm", tile, tiles, products),
        Knob("qkv_rope", "group_of", (16, 32, 64), tuple(of_case(case, "fused") for case in qkv if case in large)),
        Knob("qkv_rope", "fused_wins", either, tuple(of_case(case, "dispatch") for case in qkv)),
        Knob("mlp", "fused_wins", either, tuple(of_case(case, "dispatch") for case in mlp)),
        Knob("mlp", "PASS", grid(rows=(1, 2, 4), cols=(1024, 2048), num_warps=(4, 8)), shapes(passes)),
        Knob("mlp", "ERF_PASS", grid(rows=(4, 8, 16), cols=(128, 256), num_warps=(4, 8)),
             shapes([activation_case("gelu", 5120, tokens) for tokens in (1024, 4096)])),
        Knob("norm", "row_config", grid(num_warps=(1, 2, 4, 8)),
             shapes(norms + [merger_case(*merger, tokens) for merger in MERGERS for tokens in (1024, 9216)])),
        Knob("spatial_merge", "CONCAT_BLOCK", (512, 1024, 2048, 4096), shapes([map_case("concat", 1280, 9216)])),
        Knob("spatial_merge", "AVERAGE_BLOCK", (256, 512, 1024, 2048), shapes([map_case("average", 1280, 9216)])),
        Knob("patch_embed", "PASS_WARPS", (1, 2, 4),
             shapes([positions_case(1152, add, tokens) for add in either for tokens in (1024, 9216)])),
        *([Knob("patch_embed", "TILE", TMA_CHANGES, tuple(ordered_patches(side) for side in SIDES))] if tma else []),
        Knob("patch_embed", "fused_wins", either, shapes(patches)),
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
LONG_CHANGES = (
    *grid(block_m=(64,), block_n=(64, 128), num_warps=(4,), num_stages=(2, 3, 4)),
    *grid(block_m=(128,), block_n=(64, 128), num_warps=(8,), num_stages=(2, 3)),
)
"""`block_n` orders the sums of a segment: it may depend on dtype and head_dim, but not on what else is in the batch."""
