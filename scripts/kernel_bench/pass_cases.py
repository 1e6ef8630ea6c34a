"""Cases of single passes over memory: norms, activations and spatial merges."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernel_inputs import Inputs
from kernel_bench.attention_cases import square_image_plan
from kernel_bench.cases import (
    ELEMENT_BYTES,
    PATCH_COUNTS,
    Case,
    Implementation,
    MakeInputs,
    Target,
    add_copy_bound,
    hidden_states,
    normal,
    to_fp64,
)
from peers.torch_compile import compiled
from qwenvit import ops
from qwenvit.config.vision_config import NORM_EPS
from qwenvit.ops import reference

ACTIVATIONS = (("swiglu", 3456), ("gelu_tanh", 4304), ("quick_gelu", 5120))
"""Activation and intermediate channels."""
MERGERS = (("rms", 1280, False, True), ("layer", 1152, False, False), ("layer", 1152, True, False))
"""Arguments of `merger_case`: norm, channels, whether it normalises joined patches, whether it restores the order."""


def norm_fp64(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Return the LayerNorm or RMSNorm of fp64 rows."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS) * weight


def pass_case(
    title: str, tokens: int, make_inputs: MakeInputs, run_qwenvit: Callable[[Inputs], Any],
    run_torch: Callable[[Inputs], Any], minimum_bytes: int, flops: int,
    truth: Callable[[Inputs], Tensor] | None = None, to_comparable: Callable[[Any], Tensor] = lambda out: out,
) -> Case:  # fmt: skip
    """Return a case whose rivals are the torch sequence and `torch.compile` of it, and whose target is a bandwidth.

    The truth is by default the torch sequence in fp64.
    """
    bandwidth = Target("of the copy rate", lambda m: m.copy_seconds / m.seconds["qwenvit"], 0.85)
    case = Case(
        section="passes",
        series=title,
        title=title,
        tokens=tokens,
        head_dim=None,
        make_inputs=make_inputs,
        implementations={"qwenvit": Implementation(run_qwenvit, to_comparable)},
        rivals={
            "torch": Implementation(run_torch, to_comparable),
            "torch.compile": Implementation(compiled(run_torch), to_comparable),
        },
        truth=truth or (lambda x: to_comparable(run_torch(to_fp64(x)))),
        baseline=Implementation(run_torch, to_comparable),
        minimum_bytes=minimum_bytes,
        flops=flops,
        targets={"qwenvit": (bandwidth,) if tokens >= 4096 else ()},
    )
    return add_copy_bound(case)


def norm_case(kind: str, channels: int, residual: bool, tokens: int) -> Case:
    """Return the case of a norm, alone or after a residual sum."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        x = {
            "x": hidden_states(tokens, channels, device, dtype),
            "weight": normal(channels, device=device, dtype=dtype),
        }
        if residual:
            x["residual"] = hidden_states(tokens, channels, device, dtype)
        return x | ({"bias": normal(channels, device=device, dtype=dtype)} if kind == "layer" else {})

    def run_qwenvit(x: Inputs) -> Any:
        if residual:
            return ops.add_norm(x["x"], x["residual"], x["weight"], x.get("bias"), kind)
        return ops.norm(x["x"], x["weight"], x.get("bias"), kind)

    def run_torch(x: Inputs) -> Any:
        if residual:
            return reference.add_norm(x["x"], x["residual"], x["weight"], x.get("bias"), None, kind, NORM_EPS)
        return reference.norm(x["x"], x["weight"], x.get("bias"), kind, NORM_EPS)

    def join_outputs(out: tuple[Tensor, Tensor]) -> Tensor:
        """Scale norm and sum to the same magnitude, so that neither hides an error of the other."""
        return torch.cat([part.double() / part.double().norm() for part in out])

    def truth(x: Inputs) -> Tensor:
        x = to_fp64(x)
        total = x["x"] + x["residual"] if residual else x["x"]
        y = norm_fp64(total, x["weight"], x.get("bias"), kind)
        return join_outputs((y, total)) if residual else y

    return pass_case(
        title=f"{'add_norm' if residual else 'norm'}, {'RMS' if kind == 'rms' else 'Layer'}Norm, {channels}",
        tokens=tokens,
        make_inputs=make_inputs,
        run_qwenvit=run_qwenvit,
        run_torch=run_torch,
        minimum_bytes=((4 if residual else 2) * tokens + (2 if kind == "layer" else 1)) * channels * ELEMENT_BYTES,
        flops=7 * tokens * channels,
        truth=truth,
        to_comparable=join_outputs if residual else (lambda out: out),
    )


def activation_case(act: str, columns: int, tokens: int) -> Case:
    """Return the case of an activation without its projection; SwiGLU reads gate and up in alternate columns."""
    gated = act == "swiglu"

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        return {"x": normal(tokens, columns * (2 if gated else 1), device=device, dtype=dtype)}

    def run_qwenvit(x: Inputs) -> Tensor:
        # In place: each replay about halves small values, which stay far above zero over all replays.
        return ops.swiglu_pass(x["x"]) if gated else ops.activation_(x["x"], act)

    def run_torch(x: Inputs) -> Tensor:
        return reference.swiglu_pass(x["x"]) if gated else reference.activation(x["x"], act)

    return pass_case(
        title=f"{act} pass, {columns}",
        tokens=tokens,
        make_inputs=make_inputs,
        run_qwenvit=run_qwenvit,
        run_torch=run_torch,
        minimum_bytes=(3 if gated else 2) * tokens * columns * ELEMENT_BYTES,
        flops=10 * tokens * columns,
    )


def merger_case(kind: str, channels: int, norm_merged: bool, restore_order: bool, tokens: int) -> Case:
    """Return the case of a merger up to its first product.

    Qwen2.5-VL restores the order of windowed tokens; Qwen3-VL normalises patches, or joined patches for DeepStack.
    """
    width = 4 * channels if norm_merged else channels

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        x = {"x": hidden_states(tokens, channels, device, dtype), "weight": normal(width, device=device, dtype=dtype)}
        if restore_order:
            x["restore_index"] = square_image_plan(round(tokens**0.5), 80).restore_index.to(device, copy=True)
        return x | ({"bias": normal(width, device=device, dtype=dtype)} if kind == "layer" else {})

    def run(x: Inputs, impl: str = "auto") -> Tensor:
        return ops.merge_norm(
            x["x"], x["weight"], x.get("bias"), x.get("restore_index"), kind, norm_merged=norm_merged, impl=impl
        )

    def truth(x: Inputs) -> Tensor:
        x = to_fp64(x)
        rows = x["x"].view(-1, width)
        joined = norm_fp64(rows, x["weight"], x.get("bias"), kind).view(-1, 4 * channels)
        return joined[x["restore_index"]] if restore_order else joined

    what = "restoring order" if restore_order else "of joined patches" if norm_merged else "of patches"
    weights = (2 if kind == "layer" else 1) * width
    restore_index = 2 * tokens if restore_order else 0  # one int64 a token of four patches
    return pass_case(
        title=f"merge_norm {what}, {channels}",
        tokens=tokens,
        make_inputs=make_inputs,
        run_qwenvit=run,
        run_torch=functools.partial(run, impl="reference"),
        minimum_bytes=(2 * tokens * channels + weights) * ELEMENT_BYTES + restore_index,
        flops=6 * tokens * channels,
        truth=truth,
    )


def spatial_merge_case(mode: str, channels: int, tokens: int) -> Case:
    """Return the case of merging 2 × 2 patches by concatenation or by average."""
    side = round(tokens**0.5)

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        return {"x": normal(side, side, channels, device=device, dtype=dtype)}

    read = tokens * channels * ELEMENT_BYTES
    return pass_case(
        title=f"spatial_merge, {mode}, {channels}",
        tokens=tokens,
        make_inputs=make_inputs,
        run_qwenvit=lambda x: ops.spatial_merge(x["x"], mode),
        run_torch=lambda x: reference.spatial_merge(x["x"], mode, 2),
        minimum_bytes=read + (read if mode == "concat" else read // 4),
        flops=tokens * channels if mode == "average" else 0,
    )


def pass_cases() -> list[Case]:
    """Return the cases of the section `passes`, without those of learned positions."""
    cases = []
    for tokens in PATCH_COUNTS:
        for kind, channels in (("rms", 1280), ("layer", 1152)):
            cases += [norm_case(kind, channels, residual, tokens) for residual in (True, False)]
        cases += [activation_case(*activation, tokens) for activation in ACTIVATIONS]
        cases += [merger_case(*merger, tokens) for merger in MERGERS]
        cases += [spatial_merge_case(mode, 1280, tokens) for mode in ("concat", "average")]
    return cases
