"""Cases of single passes over memory (norms, activations, merges)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.attention_cases import plan_of
from kernel_bench.cases import ITEM, TOKENS, Bar, Case, Run, doubles, hidden_states, normal, with_copy
from kernel_bench.timing import Inputs
from peers.torch_compile import compiled
from qwenvit import ops
from qwenvit.config.vision_config import NORM_EPS
from qwenvit.ops import reference

ACTIVATIONS = (("swiglu", 3456), ("gelu_tanh", 4304), ("quick_gelu", 5120))
MERGERS = (("rms", 1280, False, True), ("layer", 1152, False, False), ("layer", 1152, True, False))
"""Norm, channels, whether joined patches are normalised, whether windows are undone."""
Make = Callable[[torch.device, torch.dtype], Inputs]


def exact_norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """In the dtype of x, fp64 here."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * weight


def pass_case(
    title: str, tokens: int, inputs: Make, ours: Callable[[Inputs], Any], plain: Callable[[Inputs], Any],
    fewest_bytes: int, flops: int, truth: Callable[[Inputs], Tensor] | None = None,
    finish: Callable[[Any], Tensor] = lambda out: out,
) -> Case:  # fmt: skip
    """A case whose rivals are the torch sequence and `torch.compile` of it; its bar is a rate of copying."""
    rate = Bar("of the copy rate", lambda f: f.one_pass / f.seconds["qwenvit"], 0.85)
    case = Case(
        section="passes",
        series=title,
        title=title,
        tokens=tokens,
        head_dim=None,
        inputs=inputs,
        ours={"qwenvit": Run(ours, finish)},
        rivals={"torch": Run(plain, finish), "torch.compile": Run(compiled(plain), finish)},
        truth=truth or (lambda x: finish(plain(doubles(x)))),
        stick=Run(plain, finish),
        fewest_bytes=fewest_bytes,
        flops=flops,
        bars={"qwenvit": (rate,) if tokens >= 4096 else ()},
    )
    return with_copy(case)


def norm_case(kind: str, channels: int, residual: bool, tokens: int) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        x = {
            "x": hidden_states(tokens, channels, device, dtype),
            "weight": normal(channels, device=device, dtype=dtype),
        }
        if residual:
            x["residual"] = hidden_states(tokens, channels, device, dtype)
        return x | ({"bias": normal(channels, device=device, dtype=dtype)} if kind == "layer" else {})

    def ours(x: Inputs) -> Any:
        if residual:
            return ops.add_norm(x["x"], x["residual"], x["weight"], x.get("bias"), kind)
        return ops.norm(x["x"], x["weight"], x.get("bias"), kind)

    def plain(x: Inputs) -> Any:
        if residual:
            return reference.add_norm(x["x"], x["residual"], x["weight"], x.get("bias"), None, kind, NORM_EPS)
        return reference.norm(x["x"], x["weight"], x.get("bias"), kind, NORM_EPS)

    def both(out: tuple[Tensor, Tensor]) -> Tensor:
        """The norm and the sum at one scale, so that neither hides the other's mistakes."""
        return torch.cat([part.double() / part.double().norm() for part in out])

    def truth(x: Inputs) -> Tensor:
        x = doubles(x)
        total = x["x"] + x["residual"] if residual else x["x"]
        y = exact_norm(total, x["weight"], x.get("bias"), kind)
        return both((y, total)) if residual else y

    name = f"{'add_norm' if residual else 'norm'}, {'RMS' if kind == 'rms' else 'Layer'}Norm"
    moved = ((4 if residual else 2) * tokens + (2 if kind == "layer" else 1)) * channels * ITEM
    finish = both if residual else (lambda out: out)
    title = f"{name}, {channels}"
    return pass_case(title, tokens, inputs, ours, plain, moved, 7 * tokens * channels, truth, finish)


def activation_case(act: str, columns: int, tokens: int) -> Case:
    gated = act == "swiglu"

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        return {"x": normal(tokens, columns * (2 if gated else 1), device=device, dtype=dtype)}

    def ours(x: Inputs) -> Tensor:  # in place, but halving what is small ends far above zero after this many replays
        return ops.swiglu_pass(x["x"]) if gated else ops.activation_(x["x"], act)

    def plain(x: Inputs) -> Tensor:
        return reference.swiglu_pass(x["x"]) if gated else reference.activation(x["x"], act)

    moved = (3 if gated else 2) * tokens * columns * ITEM
    return pass_case(f"{act} pass, {columns}", tokens, inputs, ours, plain, moved, 10 * tokens * columns)


def merger_case(kind: str, channels: int, merged: bool, reorder: bool, tokens: int) -> Case:
    """A merger's norm: of Qwen2.5-VL with its windows undone, of Qwen3-VL, and of Qwen3-VL's DeepStack."""
    width = 4 * channels if merged else channels

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        x = {"x": hidden_states(tokens, channels, device, dtype), "weight": normal(width, device=device, dtype=dtype)}
        if reorder:
            x["restore"] = plan_of(round(tokens**0.5), 80).restore_index.to(device, copy=True)
        return x | ({"bias": normal(width, device=device, dtype=dtype)} if kind == "layer" else {})

    def call(x: Inputs, impl: str = "auto") -> Tensor:
        return ops.merge_norm(x["x"], x["weight"], x.get("bias"), x.get("restore"), kind, norm_merged=merged, impl=impl)

    def truth(x: Inputs) -> Tensor:
        wide = doubles(x)
        rows = wide["x"].view(-1, width)
        joined = exact_norm(rows, wide["weight"], wide.get("bias"), kind).view(-1, 4 * channels)
        return joined[x["restore"]] if reorder else joined

    what = "restoring order" if reorder else "of joined patches" if merged else "of patches"
    moved = (2 * tokens * channels + (2 if kind == "layer" else 1) * width) * ITEM + (2 * tokens if reorder else 0)
    plain = functools.partial(call, impl="reference")
    return pass_case(f"merge_norm {what}, {channels}", tokens, inputs, call, plain, moved, 6 * tokens * channels, truth)


def map_case(mode: str, channels: int, tokens: int) -> Case:
    side = round(tokens**0.5)

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        return {"x": normal(side, side, channels, device=device, dtype=dtype)}

    moved = tokens * channels * ITEM * 2 if mode == "concat" else tokens * channels * ITEM * 5 // 4
    return pass_case(
        f"spatial_merge, {mode}, {channels}", tokens, inputs, lambda x: ops.spatial_merge(x["x"], mode),
        lambda x: reference.spatial_merge(x["x"], mode, 2), moved, tokens * channels if mode == "average" else 0,
    )  # fmt: skip


def pass_cases() -> list[Case]:
    cases = []
    for tokens in TOKENS:
        for kind, channels in (("rms", 1280), ("layer", 1152)):
            cases += [norm_case(kind, channels, residual, tokens) for residual in (True, False)]
        cases += [activation_case(*act, tokens) for act in ACTIVATIONS]
        cases += [merger_case(*merger, tokens) for merger in MERGERS]
        cases += [map_case(mode, 1280, tokens) for mode in ("concat", "average")]
    return cases
