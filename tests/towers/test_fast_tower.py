"""The fast tower against the reference tower: state dicts, outputs, and the choice between the two."""

import itertools
import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwenvit import Encoder
from qwenvit.kernels.gemm.cublas import MIN_ROWS
from qwenvit.parity import BlockCall, blocks_no_worse, close, record, replay
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.choose import tower_class
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.towers import FULL, narrow, random_pixels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FAMILIES = dict.fromkeys(FULL, False) | dict.fromkeys(("qwen2_5_omni", "qwen3_omni", "qwen3_5"), True)
"""Every family, and whether another one runs the same kernels: the two differ in names or the number of weights."""
GRIDS = [[1, 6, 10], [2, 4, 4], [1, 2, 2]]  # partial windows, a video, one token


def both(family, impl):
    torch.manual_seed(0)
    config = narrow(family, depth=2 if impl == "triton" and not GPU else 4)  # the interpreter takes seconds a block
    reference = ReferenceTower(config).requires_grad_(False)
    for parameter in reference.parameters():
        parameter += 0.02 * torch.randn(parameter.shape)  # norms and biases too differ from their initial values
    fast = FastTower(config, impl)
    fast.load_state_dict(reference.state_dict())
    return reference.to(DEVICE), fast.to(DEVICE), config


@pytest.mark.parametrize(
    ("family", "impl"),
    [
        pytest.param(family, impl, id=f"{family}-{impl}", marks=pytest.mark.long if impl == "triton" and twin else ())
        for family, twin in FAMILIES.items()
        for impl in ("reference", "triton")
    ],
)
def test_outputs_equal_the_reference_towers(family, impl, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    reference, fast, config = both(family, impl)
    plan = GridPlan.build(GRIDS, config, DEVICE)
    pixels = random_pixels(plan.num_patches, config).to(DEVICE)
    ours, theirs = fast(pixels, plan), reference(pixels, plan)
    outputs = {"last_hidden_state": (ours.last_hidden_state, theirs.last_hidden_state)}
    outputs |= {"tokens": (ours.pooler_output, theirs.pooler_output)}
    layers = zip(ours.deepstack_features, theirs.deepstack_features, strict=True)
    outputs |= {f"DeepStack {i}": pair for i, pair in enumerate(layers)}
    for name, pair in outputs.items():
        check = close(name, *pair)
        assert check.passed, check


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_no_product_of_cublas_has_few_rows(family, monkeypatch):
    """With few rows it would add in another order than with many."""
    _, fast, config = both(family, "triton")
    products, linear, addmm_ = [], F.linear, torch.Tensor.addmm_
    monkeypatch.setattr(F, "linear", lambda x, *rest: products.append(x.shape) or linear(x, *rest))
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda y, x, w: products.append(x.shape) or addmm_(y, x, w))
    grid = [[1, 2, 2]]
    fast(random_pixels(4, config).to(DEVICE), GridPlan.build(grid, config, DEVICE))
    mergers = 1 + len(config.deepstack_visual_indexes)
    assert len(products) == 1 + 4 * config.depth + 2 * mergers
    assert {rows for rows, _ in products} == {MIN_ROWS}


@pytest.mark.parametrize("family", FULL)
def test_state_dict_round_trip_keeps_the_reference_towers_weights(family):
    reference, fast, config = both(family, "reference")
    before, after = reference.state_dict(), fast.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].is_contiguous(), name
    with torch.device("meta"):
        again = FastTower(config)
        assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in before.items()}
    again.load_state_dict(after, assign=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fast.parameters(), strict=True))


@pytest.mark.parametrize("copy", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_shares_no_weights(copy):
    reference, fast, _ = both("qwen2_5_omni", "reference")
    other = copy(fast)
    for parameter in other.parameters():
        parameter.zero_()
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in fast.state_dict().items())
    other.load_state_dict(reference.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), fast.parameters(), strict=True))


def test_missing_tensors_are_named():
    reference, fast, _ = both("qwen2_5_vl", "reference")
    tensors = reference.state_dict()
    del tensors["blocks.2.mlp.up_proj.bias"], tensors["patch_embed.proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*patch_embed\.weight.*blocks\.2\.mlp\.gate_up\.weight"):
        fast.load_state_dict(tensors)


def wrong_shapes(tensor):
    """Yield tensors of the same values with a row too few or too many along one axis, or with other axes."""
    for axis, size in enumerate(tensor.shape):
        yield tensor.narrow(axis, 0, size - 1)
        yield torch.cat((tensor, tensor.narrow(axis, 0, 1)), axis)
    for axes in itertools.permutations(range(tensor.ndim)):
        if tensor.permute(axes).shape != tensor.shape:
            yield tensor.permute(axes)


@pytest.mark.parametrize("family", FULL)
def test_no_tensor_of_another_shape_is_loaded(family):
    """Padding and packing must not make wrong shapes fit."""
    config = narrow(family, depth=1)
    right = ReferenceTower(config).state_dict()
    fast = FastTower(config, "reference")
    fast.load_state_dict(right)
    for name, tensor in right.items():
        for wrong in wrong_shapes(tensor):
            with pytest.raises((RuntimeError, ValueError), match=r"(?i)size mismatch|expected|equal size"):
                fast.load_state_dict(right | {name: wrong})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_gated_mlp_of_another_width_is_not_loaded(family, change):
    """All of its tensors fit each other, and the padded width is the same."""
    config = narrow(family, depth=1)
    other = replace(config, intermediate_size=config.intermediate_size + change)
    with pytest.raises(ValueError, match=rf"expected {config.intermediate_size} rows, got {other.intermediate_size}"):
        FastTower(config, "reference").load_state_dict(ReferenceTower(other).state_dict())


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_vl"])
def test_gradients_are_refused_rather_than_left_out(family):
    """The tower called directly: whichever tensor is to have one, and not under `no_grad`."""
    config = narrow(family, depth=1)
    fast = FastTower(config, "reference")
    fast.load_state_dict(ReferenceTower(config).state_dict())
    plan = GridPlan.build([[1, 2, 2]], config)
    pixels = random_pixels(plan.num_patches, config)
    fast(pixels, plan)
    for tensor in (pixels, *fast.parameters()):
        tensor.requires_grad_()
        with pytest.raises(ValueError, match="which the fast tower does not give"):
            fast(pixels, plan)
        with torch.no_grad():
            fast(pixels, plan)
        tensor.requires_grad_(False)


def test_padding_changes_nothing():
    """Padded columns of the down projection are zero, whatever the gate's padded rows give."""
    _, fast, config = both("qwen2_5_vl", "reference")
    assert fast.blocks[0].mlp.down.weight.shape[1] == 256
    assert not fast.blocks[0].mlp.down.weight[:, config.intermediate_size :].any()
    assert not fast.patch_embed.weight[:, config.patch_dim :].any()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_blocks_work_in_place_and_the_tower_does_not(family):
    _, fast, config = both(family, "reference")
    plan = GridPlan.build(GRIDS, config, DEVICE)
    x = torch.randn(plan.num_patches, config.hidden_size, device=DEVICE)
    assert fast.blocks[0](x, plan.cos, plan.sin, plan.frames.cu_seqlens, None) is x
    pixels = random_pixels(plan.num_patches, config).to(DEVICE)
    before = pixels.clone()
    first, again = fast(pixels, plan), fast(pixels, plan)
    assert torch.equal(pixels, before)
    assert torch.equal(first.pooler_output, again.pooler_output)


class Double(nn.Module):
    """Doubles in place, as the tower's blocks work in place."""

    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states):
        hidden_states.mul_(2)
        return (hidden_states,) if self.as_tuple else hidden_states


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_parity_gate_keeps_what_a_block_overwrites(as_tuple, by_name):
    blocks, x = nn.ModuleList([Double(as_tuple), Double(as_tuple)]), torch.ones(3)

    def run():
        for block in blocks:
            block(hidden_states=x) if by_name else block(x)
        return x.clone()

    out, calls = record(blocks, run)
    x.zero_()
    assert [(call.x[0].item(), call.out[0].item()) for call in calls] == [(1, 2), (2, 4)]
    assert out[0] == 4


def test_the_parity_gate_gives_every_tower_the_same_input():
    """Ours and the other are replayed on the truth's input, here in its own dtype, and both overwrite theirs."""
    ones = torch.ones(3)
    true_calls, calls = [BlockCall(ones, (), {}, 2 * ones)], [BlockCall(0 * ones, (), {}, 0 * ones)]
    blocks = nn.ModuleList([Double(False)])
    assert all(replay(blocks[0], calls[0], ones)[0] == 2 for _ in range(2))
    (check,) = blocks_no_worse((blocks, calls), (blocks, calls), true_calls)
    assert (check.value, check.bound) == (0, 0)
    assert ones[0] == 1


def test_which_tower_runs(monkeypatch):
    config, cpu = FULL["qwen2_5_vl"], torch.device("cpu")
    assert tower_class("reference", config, cpu) is ReferenceTower
    assert tower_class("auto", config, cpu) is ReferenceTower
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl: 'triton' cannot run here: cpu is no CUDA device; use 'reference'"):
        tower_class("triton", config, cpu)
    with pytest.raises(ValueError, match="impl: expected 'auto', 'triton' or 'reference', got 'cuda'"):
        tower_class("cuda", config, cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert tower_class("auto", config, torch.device("cuda")) is FastTower
    odd = replace(config, num_heads=40)
    assert tower_class("auto", odd, torch.device("cuda")) is ReferenceTower
    with pytest.raises(ValueError, match=r"head_dim 32 is none of \(64, 72, 80\)"):
        tower_class("triton", odd, torch.device("cuda"))
    with monkeypatch.context() as older:
        older.setattr("triton.__version__", "3.4.0")
        assert tower_class("auto", config, torch.device("cuda")) is ReferenceTower
        with pytest.raises(ValueError, match=r"triton 3\.4\.0 is older than 3\.5"):
            tower_class("triton", config, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability \(7, 5\), below \(8, 0\)"):
        tower_class("triton", config, torch.device("cuda"))


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_an_encoder_with_the_fast_tower_loads_encodes_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    image = torch.randint(0, 256, (48, 80, 3), dtype=torch.uint8).numpy()
    options, small = {"device": DEVICE, "dtype": "float32"}, {"min_pixels": 4096, "max_pixels": 4096}
    fast = Encoder.from_pretrained("demo", impl="triton", **options)
    assert isinstance(fast.tower, FastTower)
    expected = Encoder.from_pretrained("demo", impl="reference", **options).encode(image, **small)
    out = fast.encode(image, **small)
    assert close("tokens", out.packed, expected.packed).passed
    fast.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path, impl="triton", **options).encode(image, **small)
    assert torch.equal(again.packed, out.packed)
    assert len(again[0].deepstack) == len(expected[0].deepstack)
