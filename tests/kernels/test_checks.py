"""Every tensor argument of every operation: a wrong shape, dtype, device or stride is refused before a kernel runs.

A kernel reads memory by the shape and strides that it expects, so an argument that nobody checks reads foreign memory.
"""

import inspect
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from qwenvit import ops
from support.towers import narrow

PATCHES, WIDTH, HEADS, HEAD_DIM = 8, 6, 2, 64


def floats(*shape):
    return torch.rand(*shape)


def integers(*shape, dtype=torch.int64):
    return torch.zeros(*shape, dtype=dtype)


NORM = {"x": floats(PATCHES, WIDTH), "weight": floats(WIDTH), "bias": floats(WIDTH), "kind": "layer"}
ADD_NORM = NORM | {"residual": floats(PATCHES, WIDTH), "shift": floats(WIDTH)}
PROJECTION = {"x": floats(PATCHES, WIDTH), "weight": floats(4, WIDTH), "bias": floats(4)}
ANGLES = {"cos": floats(PATCHES, HEAD_DIM), "sin": floats(PATCHES, HEAD_DIM)}
PACKED = 3 * HEADS * HEAD_DIM
POSITIONS = {"table": floats(9, 5), "taps": integers(PATCHES, 4), "tap_weights": floats(PATCHES, 4)}
RESTORE = {"restore_index": torch.arange(PATCHES // 4)}
CONFIG = narrow("qwen2_5_vl")
PLAN_TABLE = torch.tensor([[0, 0, 0, 2, 4], [8, 1, 1, 0, 0]])
CALLS = {
    "activation_": {"x": floats(PATCHES, WIDTH), "act": "gelu"},
    "add_linear_": {"total": floats(PATCHES, 4), "x": floats(PATCHES, WIDTH), "weight": floats(4, WIDTH)},
    "add_norm": ADD_NORM,
    "add_norm_": ADD_NORM,
    "add_positions": {"x": floats(PATCHES, 5), **POSITIONS, **RESTORE},
    "grid_plan": {
        "table": PLAN_TABLE,
        "cos_table": floats(7, CONFIG.head_dim // 4),
        "sin_table": floats(7, CONFIG.head_dim // 4),
        "config": CONFIG,
        "patches": 16,
        "frames": 3,
        "windows": 4,
    },
    "interpolate_positions": POSITIONS,
    "linear": PROJECTION,
    "linear_act": PROJECTION | {"act": "gelu"},
    "merge_norm": NORM | RESTORE,
    "norm": NORM,
    "patch_embed": {
        "pixel_values": floats(PATCHES, WIDTH),
        "weight": floats(5, WIDTH),
        "bias": floats(5),
        **POSITIONS,
        **RESTORE,
    },
    "qkv_rope": {
        "hidden_states": floats(PATCHES, WIDTH),
        "weight": floats(PACKED, WIDTH),
        "bias": floats(PACKED),
        **ANGLES,
        "num_heads": HEADS,
    },
    "resize_patches": {
        "frames": integers(2, 3, 9, 10, dtype=torch.uint8),
        "levels": floats(3, 256),
        "out": floats(4, 24),
        "height": 4,
        "width": 4,
        "rule": "torch",
        "patch_size": 2,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
    "rope_attention": {
        **{name: floats(PATCHES, HEADS, HEAD_DIM) for name in "qkv"},
        **ANGLES,
        "cu_seqlens": torch.tensor([0, 3, PATCHES], dtype=torch.int32),
    },
    "rotate_qk_": {"qkv": floats(PATCHES, PACKED), **ANGLES, "num_heads": HEADS},
    "spatial_merge": {"x": floats(4, 6, 5)},
    "swiglu": {"x": floats(PATCHES, WIDTH), "gate_up_weight": floats(4, WIDTH), "gate_up_bias": floats(4)},
    "swiglu_pass": {"gate_up": floats(PATCHES, WIDTH)},
}
"""A valid call of each operation, with all of its tensors."""
CHECKED_ELSEWHERE = {"rope_index", "clone_rows"}
"""`qwenvit.rope_index` checks its arguments under the names that its callers know; test_clone_rows.py covers the list
of tensors that `clone_rows` takes."""
ARGUMENTS = [
    (operation, name) for operation, call in CALLS.items() for name, x in call.items() if isinstance(x, torch.Tensor)
]


def changed(x):
    """Yield the names of changes to a tensor, and the changed tensors; the other arguments stay as they are."""
    for dim in range(x.ndim):
        yield f"shorter {dim}", x.narrow(dim, 0, x.shape[dim] - 1).contiguous()
        yield f"longer {dim}", torch.cat((x, x.narrow(dim, 0, 1)), dim)
    yield "one dimension more", x[None]
    yield "flat", x.flatten() if x.ndim > 1 else x[0].clone()
    yield "list", x.tolist()
    yield "unsupported dtype", x.to(torch.float64 if x.is_floating_point() else torch.int16)
    yield "other dtype", x.half() if x.is_floating_point() else x.float()
    yield "other device", x.to("meta")
    yield "strided elements", torch.stack((x, x), -1)[..., 0]
    if x.ndim > 1:
        yield "strided rows", F.pad(x, (0, 1))[..., :-1]


OWN_FAULTS = {"list", "unsupported dtype", "strided elements", "strided rows"}
"""The error names the argument itself. Other changes make two arguments differ, and it may name either."""
ANY_ROWS = {"shorter 0", "longer 0"}
ALONE = {"other dtype", "other device"}
"""Accepted where a call has one tensor, which need not agree with another."""
ACCEPTED = {
    ("activation_", "x"): {*ANY_ROWS, "shorter 1", "longer 1", *ALONE},
    ("grid_plan", "table"): ANY_ROWS,
    ("grid_plan", "cos_table"): ANY_ROWS,
    ("grid_plan", "sin_table"): ANY_ROWS,
    ("interpolate_positions", "table"): {*ANY_ROWS, "shorter 1", "longer 1", "other dtype"},
    ("add_positions", "table"): ANY_ROWS,
    ("patch_embed", "table"): ANY_ROWS,
    ("patch_embed", "pixel_values"): {"other dtype"},
    ("patch_embed", "weight"): {"strided rows"},
    ("linear", "x"): ANY_ROWS,
    ("linear_act", "x"): ANY_ROWS,
    ("swiglu", "x"): ANY_ROWS,
    ("norm", "x"): ANY_ROWS | {"one dimension more"},
    ("rope_attention", "cu_seqlens"): ANY_ROWS,
    **{("rope_attention", name): {"strided rows"} for name in ("q", "k", "v", "cos", "sin")},
    ("rotate_qk_", "qkv"): {"other dtype"},
    ("spatial_merge", "x"): {"shorter 2", "longer 2", "one dimension more", "strided rows", *ALONE},
    ("swiglu_pass", "gate_up"): {*ANY_ROWS, *ALONE},
    ("resize_patches", "frames"): {
        "shorter 0", "shorter 2", "longer 2", "shorter 3", "longer 3", "strided elements", "strided rows",
    },
}  # fmt: skip
"""The changes that leave a call valid, by operation and argument. All others are refused."""


def passes_checks(operation, call):
    """Return whether a call is valid, and the argument that its error names.

    The error of a valid call is the unknown `impl`, which is refused last: no kernel runs, whatever the arguments.
    """
    with pytest.raises((TypeError, ValueError), match=r"^\w+: .*expected .*got") as error:
        getattr(ops, operation)(**call, impl="unknown")
    return str(error.value).startswith("impl: "), str(error.value).partition(":")[0]


def test_all_tensors_of_all_operations_are_listed():
    assert set(CALLS) == set(ops.__all__) - CHECKED_ELSEWHERE
    for operation, call in CALLS.items():
        parameters = inspect.signature(getattr(ops, operation)).parameters
        tensors = {name for name, x in parameters.items() if torch.Tensor in (x.annotation, *get_args(x.annotation))}
        assert tensors == {name for name, x in call.items() if isinstance(x, torch.Tensor)}, operation


@pytest.mark.parametrize("operation", CALLS)
def test_the_unchanged_calls_run(operation):
    call = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in CALLS[operation].items()}
    getattr(ops, operation)(**call, impl="reference")


@pytest.mark.parametrize(("operation", "argument"), ARGUMENTS)
def test_what_does_not_fit_is_refused(operation, argument):
    call, accepted, misnamed = CALLS[operation], set(), set()
    for change, x in changed(call[argument]):
        passed, named = passes_checks(operation, call | {argument: x})
        if passed:
            accepted.add(change)
        elif named != argument and change in OWN_FAULTS:
            misnamed.add((change, named))
    assert accepted == ACCEPTED.get((operation, argument), set())
    assert not misnamed


DIFFERENTIABLE = [(operation, name) for operation, name in ARGUMENTS if CALLS[operation][name].is_floating_point()]


@pytest.mark.parametrize(("operation", "argument"), DIFFERENTIABLE)
def test_gradients_of_any_argument_are_refused_by_triton(operation, argument):
    """Autograd would give none, and warn at most."""
    call = CALLS[operation] | {argument: CALLS[operation][argument].clone().requires_grad_()}
    with pytest.raises(ValueError, match=r"^impl: 'triton' means Triton here, which gives no gradients"):
        getattr(ops, operation)(**call, impl="triton")


@pytest.mark.parametrize("operation", ["qkv_rope", "rotate_qk_"])
def test_heads_of_a_multiple_of_four_channels(operation):
    """RoPE in two dimensions rotates as many pairs by the row as by the column."""
    for head_dim in range(1, 13):
        width, angles = 3 * HEADS * head_dim, floats(PATCHES, head_dim)
        sizes = {"weight": (width, WIDTH), "bias": (width,), "qkv": (PATCHES, width)}
        call = CALLS[operation] | {"cos": angles, "sin": angles}
        call |= {name: floats(*sizes[name]) for name in call if name in sizes}
        assert passes_checks(operation, call)[0] == (head_dim % 4 == 0)


def test_the_largest_head_dim_of_a_plan():
    for head_dim in (124, 128, 132, 256):
        tower = narrow("qwen2_5_vl", hidden_size=2 * head_dim, num_heads=2)
        angles = floats(7, head_dim // 4)
        call = CALLS["grid_plan"] | {"config": tower, "cos_table": angles, "sin_table": angles}
        assert passes_checks("grid_plan", call)[0] == (head_dim <= 128)


def test_patches_of_a_plan_and_of_a_merge_are_whole_tokens():
    for patches in range(1, 13):
        whole = patches % 4 == 0
        assert passes_checks("grid_plan", CALLS["grid_plan"] | {"patches": patches})[0] == whole
        rows = {"x": floats(patches, WIDTH), "restore_index": torch.arange(patches // 4)}
        assert passes_checks("merge_norm", CALLS["merge_norm"] | rows)[0] == whole
