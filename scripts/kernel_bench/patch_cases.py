"""Cases of the tower's first layer: patch embedding, and learned positions."""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.attention_cases import plan_of
from kernel_bench.cases import ITEM, SIDES, TOKENS, Bar, Case, Run, hidden_states, linear_weight, normal
from kernel_bench.pass_cases import pass_case
from kernel_bench.timing import Inputs
from qwenvit import ops
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops import reference
from qwenvit.ops.packing import pad_columns
from qwenvit.plan.grid_plan import GridPlan

TABLE = 48
"""Side of the table of learned positions."""
BARE = {"bare cuBLAS": "weight", "bare cuBLAS, padded rows": "padded"}
"""A product of the same shape, of values in bf16 already, without bias; by the weight it takes."""


@functools.cache
def learned_plan(patches: int) -> GridPlan:
    config = VisionConfig(
        "qwen3_vl", 27, 1152, 4304, 16, 4096, "gelu_pytorch_tanh", 16, num_position_embeddings=TABLE**2
    )
    return GridPlan.build([[1, patches, patches]], config)


def position_inputs(patches: int, channels: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    plan = learned_plan(patches)
    taps, weights = plan.position_taps.to(device, copy=True), plan.position_weights.to(device, copy=True)
    return {"table": normal(TABLE**2, channels, device=device, dtype=dtype), "taps": taps, "tap_weights": weights}


def positions_case(channels: int, add: bool, tokens: int) -> Case:
    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        x = position_inputs(round(tokens**0.5), channels, device, dtype)
        return x | ({"x": hidden_states(tokens, channels, device, dtype)} if add else {})

    def ours(x: Inputs) -> Tensor:
        positions = x["table"], x["taps"], x["tap_weights"]
        return ops.add_positions(x["x"], *positions) if add else ops.interpolate_positions(*positions)

    def plain(x: Inputs) -> Tensor:
        positions = x["table"], x["taps"], x["tap_weights"]
        if add:
            return reference.add_positions(x["x"], *positions, None, 4)
        return reference.interpolate_positions(*positions)

    moved = ((2 if add else 1) * tokens + TABLE**2) * channels * ITEM + 48 * tokens
    title = f"{'add' if add else 'interpolate'}_positions, {channels}"
    return pass_case(title, tokens, inputs, ours, plain, moved, 9 * tokens * channels)


def patch_case(model: str, side: int, pixels: torch.dtype | None) -> Case:
    """Patch embedding of one square image; `pixels` is the dtype of its values where it is not the tower's."""
    learned = model == "Qwen3-VL"
    patch, width = (16, 1152) if learned else (14, 1280)
    patches, columns = side // patch, 6 * patch**2
    tokens = patches**2
    rest = ("bias", "table", "taps", "tap_weights", "restore")

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        values, weight = (
            normal(tokens, columns, device=device, dtype=dtype),
            linear_weight(width, columns, device, dtype),
        )
        x = {"pixels": values.to(pixels or dtype), "values": values, "weight": weight}
        x["padded"] = pad_columns(weight, 64)[:, :columns]
        if learned:
            bias = {"bias": normal(width, device=device, dtype=dtype)}
            return x | position_inputs(patches, width, device, dtype) | bias
        return x | {"restore": plan_of(patches, 80).restore_index.to(device, copy=True)}

    def plain(x: Inputs) -> Tensor:
        return reference.patch_embed(x["pixels"], x["weight"], *(x.get(name) for name in rest), 4)

    case = pass_case(
        title=f"{model}, {columns} → {width}, {'fp32' if pixels else 'bf16'} pixels",
        tokens=tokens,
        inputs=inputs,
        ours=lambda x: ops.patch_embed(x["pixels"], x["padded"], *(x.get(name) for name in rest)),
        plain=plain,
        fewest_bytes=_patch_bytes(tokens, columns, width, learned, pixels),
        flops=2 * tokens * columns * width,
    )
    bare = {name: Run(lambda x, key=key: F.linear(x["values"], x[key])) for name, key in BARE.items()}
    bar = Bar("over bare cuBLAS", lambda f: f.over("qwenvit", *BARE), 0.95, any_kernel=True)
    return dataclasses.replace(
        case,
        section="patch",
        floors={**case.floors, **bare},
        bars={"qwenvit": (bar,)},
        pass_bytes={"_convert_rows": 2 * tokens * columns * ITEM, "_add_position_rows": 2 * tokens * width * ITEM},
    )


def _patch_bytes(tokens: int, columns: int, width: int, learned: bool, pixels: torch.dtype | None) -> int:
    """Pixel values, weight and result; bias, table and taps, or the order of tokens."""
    values = tokens * columns * (4 if pixels else ITEM) + (columns + tokens) * width * ITEM
    return values + ((1 + TABLE**2) * width * ITEM + 48 * tokens if learned else 2 * tokens)


def patch_cases() -> list[Case]:
    cases = [positions_case(1152, add, tokens) for add in (True, False) for tokens in TOKENS]
    for model in ("Qwen2.5-VL", "Qwen3-VL"):
        cases += [patch_case(model, side, pixels) for pixels in (None, torch.float32) for side in SIDES]
    return cases
