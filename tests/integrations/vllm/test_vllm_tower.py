"""The tower as vLLM's models hold it: its output's layout, and weights that come in any parts and order."""

import random
import re

import pytest
import torch
from torch import nn

from qwenvit.config.vision_config import VisionConfig
from qwenvit.integrations.vllm import tower as adapter_module
from qwenvit.integrations.vllm.tower import VllmTower
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.errors import error
from support.tiny_models import CLASSES, build_wide, visual
from support.towers import random_pixels

FAMILIES = list(CLASSES)
KINDS = {"reference": ReferenceTower, "packed": lambda config: FastTower(config, "reference")}
GRID = [[1, 4, 6], [2, 8, 4], [1, 2, 2]]
PATCHES = 24 + 64 + 4


def truth(family):
    """Return transformers' tower, our config of it, and its tensors under official names."""
    tower = visual(build_wide(family)).eval()
    return tower, VisionConfig.from_hf(tower.config.to_dict()), dict(tower.named_parameters())


def made(config, kind="packed", **options):
    """Return a `VllmTower` whose weights are poisoned."""
    adapter = VllmTower(KINDS[kind](config), **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(torch.nan)
    return adapter


@torch.no_grad()
def output(hf_tower, pixels, grid):
    out = hf_tower(pixels, grid_thw=torch.tensor(grid))
    return torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=1)


def shuffled_parts(tensors, seed=0, parts=5):
    order = [*tensors.items()]
    random.Random(seed).shuffle(order)
    return [order[index::parts] for index in range(parts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_any_order_and_parts_give_transformers_output_in_vllm_layout(family, kind):
    hf_tower, config, tensors = truth(family)
    adapter = made(config, kind)
    addresses = [parameter.data_ptr() for parameter in adapter.parameters()]
    expected, seen = dict(adapter.named_parameters()).keys(), set()
    for part in shuffled_parts(tensors):
        assert not seen >= expected
        seen |= adapter.load_weights(part)
    assert seen == expected
    pixels = random_pixels(PATCHES, config)
    got = adapter(pixels, GRID)
    assert got.shape == (PATCHES // 4, adapter.out_hidden_size)
    assert error(got, output(hf_tower, pixels, GRID)) < 1e-5
    assert [parameter.data_ptr() for parameter in adapter.parameters()] == addresses


@pytest.mark.parametrize("family", FAMILIES)
def test_one_tensor_loaded_anew_changes_that_tensor_alone(family):
    hf_tower, config, tensors = truth(family)
    adapter, pixels = made(config), random_pixels(PATCHES, config)
    adapter.load_weights(tensors.items())
    for name, parameter in tensors.items():
        if name.startswith(("patch_embed", "pos_embed", "blocks.1.", "merger")):
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
            complete = adapter.load_weights([(name, parameter)])
            assert len(complete) == len(list(adapter.parameters()))
    assert error(adapter(pixels, GRID), output(hf_tower, pixels, GRID)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_never_came_leaves_its_parameter_incomplete(kind):
    _, config, tensors = truth("qwen2_5_vl")
    adapter = made(config, kind)
    missing = "blocks.1.mlp.up_proj.bias"
    complete = adapter.load_weights((name, tensor) for name, tensor in tensors.items() if name != missing)
    left = dict(adapter.named_parameters()).keys() - complete
    assert left
    assert all(name.startswith("blocks_1_mlp_") for name in left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_rounds_to_the_tower_dtype_bit_for_bit(dtype):
    _, config, tensors = truth("qwen3_vl")
    streamed = VllmTower(FastTower(config, "reference").to(dtype))
    streamed.load_weights(tensors.items())
    whole = FastTower(config, "reference").to(dtype)
    reference = ReferenceTower(config).to(dtype)
    reference_adapter = VllmTower(reference)
    reference_adapter.load_weights(tensors.items())
    whole.load_state_dict(reference.state_dict())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, streamed.get_parameter(name.replace(".", "_"))), name


def test_an_unknown_name_and_a_wrong_shape_are_refused():
    _, config, tensors = truth("qwen3_vl")
    adapter = made(config)
    with pytest.raises(ValueError, match=r"weights: expected tensors of a qwen3_vl tower, .* got 'blocks\.9\.norm1"):
        adapter.load_weights([("blocks.9.norm1.weight", torch.ones(128))])
    with pytest.raises(ValueError, match=r"got 'merger\.ln_q\.weight'"):
        adapter.load_weights([("merger.ln_q.weight", torch.ones(128))])
    name, rows = "blocks.0.mlp.linear_fc1.bias", len(tensors["blocks.0.mlp.linear_fc1.bias"])
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: expected shape \[{rows}\], got \[3\]"):
        adapter.load_weights([(name, torch.ones(3))])


def test_weights_may_be_loaded_and_used_in_inference_mode():
    _, config, tensors = truth("qwen3_vl")
    adapter, pixels = made(config), random_pixels(PATCHES, config)
    with torch.inference_mode():
        adapter.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
        got = adapter(pixels.clone(), GRID)
    adapter.load_weights(tensors.items())
    assert torch.equal(got, adapter(pixels, GRID))


def test_grids_come_as_lists_or_tensors():
    _, config, tensors = truth("qwen2_5_vl")
    adapter, pixels = made(config), random_pixels(PATCHES, config)
    adapter.load_weights(tensors.items())
    expected = adapter(pixels, GRID)
    for grid in (torch.tensor(GRID), torch.tensor(GRID, dtype=torch.int32), [tuple(each) for each in GRID]):
        assert torch.equal(adapter(pixels, grid_thw=grid), expected)
    with pytest.raises(ValueError, match="encoder_metadata: expected None"):
        adapter(pixels, GRID, encoder_metadata={})


class Normalise(nn.Module):
    """As vLLM's module is called: raw bytes in, the tower's dtype out."""

    def forward(self, pixel_values, dtype):
        return (pixel_values.float() / 127.5 - 1).to(dtype)


@pytest.mark.parametrize("use_graphs", [True, False])
def test_raw_bytes_are_normalised_by_the_input_norm(use_graphs):
    _, config, tensors = truth("qwen3_vl")
    adapter = made(config, input_norm=Normalise(), use_graphs=use_graphs)
    plain = made(config)
    adapter.load_weights(tensors.items())
    plain.load_weights(tensors.items())
    raw = torch.randint(0, 256, (PATCHES, config.patch_dim), dtype=torch.uint8)
    assert torch.equal(adapter(raw, GRID), plain(raw.float() / 127.5 - 1, GRID))


def test_what_models_ask_of_their_tower():
    _, config, _ = truth("qwen3_vl")
    adapter = VllmTower(FastTower(config, "reference").to(torch.bfloat16))
    assert (adapter.dtype, adapter.device) == (torch.bfloat16, torch.device("cpu"))
    assert adapter.spatial_merge_size == 2
    assert adapter.deepstack_visual_indexes == [0]
    assert adapter.out_hidden_size == 2 * config.out_hidden_size


def test_state_dict_and_parameters_are_the_tower_memory():
    """vLLM's loader of dummy weights writes there, by either, in one version or another."""
    _, config, _ = truth("qwen2_5_vl")
    adapter = VllmTower(FastTower(config, "reference"))
    memory = {parameter.data_ptr() for parameter in adapter.tower.parameters()}
    assert {parameter.data_ptr() for parameter in adapter.parameters()} == memory
    assert {tensor.data_ptr() for tensor in adapter.state_dict().values()} == memory


def test_weights_load_while_the_registered_parameters_are_elsewhere():
    """vLLM's reload of weights puts parameters on the meta device in place of all modules' own, and these back."""
    hf_tower, config, tensors = truth("qwen3_vl")
    adapter, pixels = made(config), random_pixels(PATCHES, config)
    kept = dict(adapter._parameters)
    for name, parameter in kept.items():
        delattr(adapter, name)
        adapter.register_parameter(name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    adapter.load_weights(tensors.items())
    for name, parameter in kept.items():
        delattr(adapter, name)
        adapter.register_parameter(name, parameter)
    assert error(adapter(pixels, GRID), output(hf_tower, pixels, GRID)) < 1e-5


def test_graphs_are_captured_for_as_many_patches_as_graphs_take(monkeypatch):
    _, config, _ = truth("qwen3_vl")
    warmed = []

    class Graphs:
        warm_up = warmed.append

    monkeypatch.setattr(adapter_module, "graphs_of", lambda _: Graphs)
    for options in ({}, {"use_graphs": False}):
        for patches in (96, 65536):
            made(config, **options).warm_up(patches)
    assert warmed == [96, 32768]
