"""Cases of the tower's first layer: patch embedding and learned positions."""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernel_inputs import Inputs
from kernel_bench.attention_cases import square_image_plan
from kernel_bench.cases import (
    ELEMENT_BYTES,
    IMAGE_SIDES,
    PATCH_COUNTS,
    Case,
    Implementation,
    Target,
    hidden_states,
    linear_weight,
    normal,
)
from kernel_bench.pass_cases import pass_case
from qwenvit import ops
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops import reference
from qwenvit.ops.packing import pad_columns
from qwenvit.plan.grid_plan import GridPlan

TABLE_SIDE = 48
"""Rows and columns of the table of learned positions."""
POSITION_BYTES = 48
"""Bytes of one patch's four table indices (int64) and four weights (fp32)."""
BARE_PRODUCTS = {"bare cuBLAS": "weight", "bare cuBLAS, padded rows": "padded_weight"}
"""Products of the same shape, of bf16 values and without bias, and the weight that each reads."""


@functools.cache
def learned_position_plan(patches: int) -> GridPlan:
    """Return the plan of one square image of `patches` × `patches` for a tower with learned positions."""
    config = VisionConfig(
        "qwen3_vl", 27, 1152, 4304, 16, 4096, "gelu_pytorch_tanh", 16, num_position_embeddings=TABLE_SIDE**2
    )
    return GridPlan.build([[1, patches, patches]], config)


def position_inputs(patches: int, channels: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return a random table and the interpolation of one square image of `patches` × `patches`."""
    plan = learned_position_plan(patches)
    taps, weights = plan.position_taps.to(device, copy=True), plan.position_weights.to(device, copy=True)
    return {"table": normal(TABLE_SIDE**2, channels, device=device, dtype=dtype), "taps": taps, "tap_weights": weights}


def positions_case(channels: int, add: bool, tokens: int) -> Case:
    """Return the case of interpolating learned positions, and with `add` of adding them to the patches."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        x = position_inputs(round(tokens**0.5), channels, device, dtype)
        return x | ({"x": hidden_states(tokens, channels, device, dtype)} if add else {})

    def run_qwenvit(x: Inputs) -> Tensor:
        positions = x["table"], x["taps"], x["tap_weights"]
        return ops.add_positions(x["x"], *positions) if add else ops.interpolate_positions(*positions)

    def run_torch(x: Inputs) -> Tensor:
        positions = x["table"], x["taps"], x["tap_weights"]
        if add:
            return reference.add_positions(x["x"], *positions, None, 4)
        return reference.interpolate_positions(*positions)

    rows = (2 if add else 1) * tokens + TABLE_SIDE**2
    return pass_case(
        title=f"{'add' if add else 'interpolate'}_positions, {channels}",
        tokens=tokens,
        make_inputs=make_inputs,
        run_qwenvit=run_qwenvit,
        run_torch=run_torch,
        minimum_bytes=rows * channels * ELEMENT_BYTES + POSITION_BYTES * tokens,
        flops=9 * tokens * channels,
    )


def patch_embed_case(model: str, side: int, pixel_dtype: torch.dtype | None) -> Case:
    """Return the case of embedding the patches of one image of `side`² pixels.

    `pixel_dtype` is the dtype of the pixel values; None means the tower's.
    """
    learned_positions = model == "Qwen3-VL"
    patch_size, width = (16, 1152) if learned_positions else (14, 1280)
    patches, columns = side // patch_size, 6 * patch_size**2
    tokens = patches**2
    optional_inputs = ("bias", "table", "taps", "tap_weights", "restore_index")

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        values = normal(tokens, columns, device=device, dtype=dtype)
        weight = linear_weight(width, columns, device, dtype)
        x = {"pixel_values": values.to(pixel_dtype or dtype), "values": values, "weight": weight}
        x["padded_weight"] = pad_columns(weight, 64)[:, :columns]
        if learned_positions:
            bias = {"bias": normal(width, device=device, dtype=dtype)}
            return x | position_inputs(patches, width, device, dtype) | bias
        return x | {"restore_index": square_image_plan(patches, 80).restore_index.to(device, copy=True)}

    def run_qwenvit(x: Inputs) -> Tensor:
        return ops.patch_embed(x["pixel_values"], x["padded_weight"], *(x.get(name) for name in optional_inputs))

    def run_torch(x: Inputs) -> Tensor:
        return reference.patch_embed(x["pixel_values"], x["weight"], *(x.get(name) for name in optional_inputs), 4)

    case = pass_case(
        title=f"{model}, {columns} → {width}, {'fp32' if pixel_dtype else 'bf16'} pixels",
        tokens=tokens,
        make_inputs=make_inputs,
        run_qwenvit=run_qwenvit,
        run_torch=run_torch,
        minimum_bytes=_minimum_bytes(tokens, columns, width, learned_positions, pixel_dtype),
        flops=2 * tokens * columns * width,
    )
    bare = {
        name: Implementation(lambda x, weight=weight: F.linear(x["values"], x[weight]))
        for name, weight in BARE_PRODUCTS.items()
    }
    over_bare = Target("over bare cuBLAS", lambda m: m.speedup("qwenvit", *BARE_PRODUCTS), 0.95, any_kernel=True)
    return dataclasses.replace(
        case,
        section="patch",
        lower_bounds={**case.lower_bounds, **bare},
        targets={"qwenvit": (over_bare,)},
        pass_bytes={
            "_convert_rows": 2 * tokens * columns * ELEMENT_BYTES,
            "_add_position_rows": 2 * tokens * width * ELEMENT_BYTES,
        },
    )


def _minimum_bytes(
    tokens: int, columns: int, width: int, learned_positions: bool, pixel_dtype: torch.dtype | None
) -> int:
    """Count pixel values, weight and result; then bias, table and its indices and weights, or the token order."""
    pixel_values = tokens * columns * (4 if pixel_dtype else ELEMENT_BYTES)
    weight_and_result = (columns + tokens) * width * ELEMENT_BYTES
    if learned_positions:
        return pixel_values + weight_and_result + (1 + TABLE_SIDE**2) * width * ELEMENT_BYTES + POSITION_BYTES * tokens
    return pixel_values + weight_and_result + 2 * tokens  # one int64 a token of four patches


def patch_cases() -> list[Case]:
    """Return the cases of the section `patch`, and those of learned positions of the section `passes`."""
    cases = [positions_case(1152, add, tokens) for add in (True, False) for tokens in PATCH_COUNTS]
    for model in ("Qwen2.5-VL", "Qwen3-VL"):
        cases += [
            patch_embed_case(model, side, pixel_dtype) for pixel_dtype in (None, torch.float32) for side in IMAGE_SIDES
        ]
    return cases
