"""VisionAttention: state dicts with the checkpoints' rows, and outputs of transformers' attention layer."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention

from qwenvit import VisionAttention, VisionConfig
from qwenvit.parity import ERROR_FACTOR, Difference
from qwenvit.plan.grid_plan import GridPlan

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CASES = [(64, 2, torch.float32), (72, 1, torch.float16), (80, 2, torch.float32)]
CASES = [(80, 16, torch.bfloat16), (72, 16, torch.float16), (64, 16, torch.float32)] if GPU else CASES


def transformers_layer(head_dim, heads, dtype):
    config = SimpleNamespace(hidden_size=heads * head_dim, num_heads=heads, _attn_implementation="sdpa")
    layer = Qwen2_5_VLVisionAttention(config).to(DEVICE, dtype).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, device=DEVICE) * parameter.shape[-1] ** -0.5)
    return layer


def inputs(head_dim, heads, dtype):
    """Return hidden states and the plan of two images, with windows."""
    width = heads * head_dim
    config = VisionConfig(
        "qwen2_5_vl", 1, width, width, heads, width, "silu", 14, window_size=112, fullatt_block_indexes=(0,)
    )
    plan = GridPlan.build([[1, 34, 32], [1, 6, 10]] if GPU else [[1, 10, 10], [1, 6, 4]], config, DEVICE)
    hidden_states = torch.randn(plan.num_patches, width, device=DEVICE, dtype=dtype)
    hidden_states[:, 3] *= 100
    return hidden_states, plan


@pytest.mark.parametrize("windows", [True, False], ids=["windows", "frames"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(("head_dim", "heads", "dtype"), CASES, ids=str)
def test_outputs_equal_transformers_layer(head_dim, heads, dtype, impl, windows):
    theirs = transformers_layer(head_dim, heads, dtype)
    ours = VisionAttention(heads * head_dim, heads, impl=impl, device=DEVICE, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    hidden_states, plan = inputs(head_dim, heads, dtype)
    segments = plan.windows if windows else plan.frames
    angles = (plan.cos, plan.sin)
    out = ours(hidden_states, *angles, segments.cu_seqlens, 64 if windows else None)
    reference = theirs(hidden_states, segments.cu_seqlens, position_embeddings=angles)
    exact = theirs.double()(
        hidden_states.double(), segments.cu_seqlens, position_embeddings=tuple(x.double() for x in angles)
    )
    floor = 1e-6 if dtype == torch.float32 else 0.0  # either may add in another order
    error, baseline_error = (Difference.of(x, exact).relative_l2 for x in (out, reference))
    assert error <= max(ERROR_FACTOR * baseline_error, floor), (error, baseline_error)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_state_dict_round_trip_keeps_the_checkpoints_order_of_rows(head_dim):
    width = 2 * head_dim
    theirs = transformers_layer(head_dim, 2, torch.float32)
    ours = VisionAttention(width, 2, device=DEVICE)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    assert not torch.equal(ours.qkv.weight, before["qkv.weight"])
    outer = torch.nn.ModuleDict({"attn": ours})
    for state_dict, prefix in ((ours.state_dict(), ""), (outer.state_dict(), "attn.")):
        assert sorted(state_dict) == sorted(prefix + name for name in before)
        for name, tensor in before.items():
            assert torch.equal(state_dict[prefix + name], tensor)
            assert torch.equal(theirs.state_dict()[name], tensor), "the caller's tensors were changed"
    again = torch.nn.ModuleDict({"attn": VisionAttention(width, 2, device="meta")})
    again.load_state_dict(outer.state_dict(), assign=True)
    for name, parameter in ours.named_parameters():
        assert torch.equal(again["attn"].get_parameter(name), parameter), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_whose_weights_were_not_loaded_attends_like_its_state_dict(dtype):
    """The ones that attention on Hopper adds up with do not depend on what the rows beside V contain."""
    fresh = VisionAttention(2 * 72, 2, impl="triton" if GPU else "reference", device=DEVICE, dtype=dtype)
    loaded = VisionAttention(2 * 72, 2, impl="reference", device=DEVICE, dtype=dtype)
    loaded.load_state_dict(fresh.state_dict())
    hidden_states, plan = inputs(72, 2, dtype)
    hidden_states[:, 3] /= 100
    arguments = hidden_states, plan.cos, plan.sin, plan.frames.cu_seqlens
    expected = loaded(*arguments)
    assert Difference.of(fresh(*arguments), expected).relative_l2 < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_wrong_shapes_are_refused_by_name(head_dim):
    layer = VisionAttention(2 * head_dim, 2)
    with pytest.raises(ValueError, match=rf"qkv\.weight: expected {6 * head_dim} rows, got {3 * head_dim}"):
        layer.load_state_dict(VisionAttention(head_dim, 1).state_dict())
    packed = {name: torch.zeros(448, *parameter.shape[1:]) for name, parameter in layer.named_parameters()}
    with pytest.raises(ValueError, match=rf"qkv\.weight: expected {6 * head_dim} rows, got 448"):
        layer.load_state_dict(packed)
    other_width = layer.state_dict() | {"qkv.weight": torch.zeros(6 * head_dim, 5)}
    with pytest.raises(RuntimeError, match=r"size mismatch for qkv\.weight"):
        layer.load_state_dict(other_width)
    with pytest.raises(RuntimeError, match=r"Missing key.*qkv\.bias"):
        layer.load_state_dict({"qkv.weight": layer.state_dict()["qkv.weight"]})
    with pytest.raises(ValueError, match=r"hidden_size: expected num_heads times one of \(64, 72, 80\), got 100 with"):
        VisionAttention(100, 2)


def test_gradients_are_refused_by_triton_and_given_by_the_reference():
    hidden_states, plan = inputs(64, 2, torch.float32)
    arguments = (hidden_states.requires_grad_(), plan.cos, plan.sin, plan.frames.cu_seqlens)
    with pytest.raises(ValueError, match="impl: 'triton' means Triton here, which gives no gradients"):
        VisionAttention(128, 2, impl="triton", device=DEVICE)(*arguments)
    layer = VisionAttention(128, 2, impl="reference", device=DEVICE)
    layer(*arguments).sum().backward()
    assert hidden_states.grad.isfinite().all()
    with torch.no_grad():
        VisionAttention(128, 2, impl="triton", device=DEVICE)(*arguments)
