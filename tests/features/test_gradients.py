"""Gradients of images, pixel values and weights against those of transformers' processor and tower."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from common.hf_towers import build_tower
from qwenvit.encoder import Encoder
from qwenvit.weights.names import official_name
from support.hidden_states import hidden_states
from support.towers import SMALL, narrow, ours_from, random_pixels

FAMILIES = list(SMALL)
ROOT = Path(__file__).resolve().parents[2]
GRIDS = [[1, 10, 8], [2, 4, 6], [1, 2, 2]]


def towers(family, depth=3):
    config = narrow(family, depth=depth)
    hf = build_tower(config)
    enc = Encoder(ours_from(hf, config))
    enc.tower.requires_grad_()
    return hf, enc


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def weighted(tensors):
    """Return a number that depends on every value of the tensors, each in its own way."""
    generator = torch.Generator().manual_seed(1)
    return sum((one * torch.randn(one.shape, generator=generator)).sum() for one in tensors)


def pair(tensor):
    return tensor.clone().requires_grad_(), tensor.clone().requires_grad_()


def assert_equal_weight_gradients(hf, enc, without=()):
    theirs = dict(hf.named_parameters())
    compared = 0
    for name, parameter in enc.tower.named_parameters():
        expected = theirs[official_name(name, enc.config.family)].grad
        if expected is None or not expected.any():
            assert parameter.grad is None or not parameter.grad.any(), name
            assert name.startswith(without), name
            continue
        assert_close(parameter.grad, expected)
        compared += 1
    assert compared > 8 * enc.config.depth


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_tokens_are_those_of_transformers(family):
    hf, enc = towers(family)
    ours, theirs = pair(random_pixels(80 + 48 + 4, enc.config))
    out = enc(ours, torch.tensor(GRIDS))
    weighted([out.pooler_output, *out.deepstack_features]).backward()
    out = hf(theirs, grid_thw=torch.tensor(GRIDS), return_dict=True)
    weighted([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]).backward()
    assert_close(ours.grad, theirs.grad)
    assert_equal_weight_gradients(hf, enc)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_maps_are_those_of_transformers(family):
    hf, enc = towers(family)
    layers = (0, 2, -1)
    ours, theirs = pair(random_pixels(80 + 48 + 4, enc.config))
    items = enc.features_of_pixels(ours, torch.tensor(GRIDS), layers)
    weighted([one.flatten(0, -2) for item in items for one in item.maps]).backward()
    states = hidden_states(hf, enc.config, theirs, GRIDS)
    weighted([item[layer].flatten(0, -2) for item in states for layer in layers]).backward()
    assert_close(ours.grad, theirs.grad)
    assert_equal_weight_gradients(hf, enc, without=("merger", "deepstack"))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_images_are_those_of_transformers_processor_and_tower(family):
    hf, enc = towers(family, depth=2)
    processor = Qwen2VLImageProcessor.from_dict(enc.image_processor.with_bounds(min_pixels=1).to_hf())
    side = enc.image_processor.factor
    image = torch.rand(3, 3 * side + 5, 2 * side - 9, generator=torch.Generator().manual_seed(0))
    ours, theirs = pair(image)
    pixel_values, grid = enc.image_processor(ours, differentiable=True, do_rescale=False, min_pixels=1)
    weighted([enc(pixel_values, grid).pooler_output]).backward()
    inputs = processor([theirs], return_tensors="pt", do_rescale=False, input_data_format="channels_first")
    assert torch.equal(pixel_values, inputs["pixel_values"])
    out = hf(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], return_dict=True)
    weighted([out.pooler_output]).backward()
    assert theirs.grad.abs().min() > 0
    assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_checkpointing_keeps_less_and_runs_each_block_again(family):
    """The gradients are the same to the bit: the same operations run on the same numbers."""
    depth = 6
    _, enc = towers(family, depth)
    runs, kept, gradients = [], [], []
    for block in enc.tower.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))  # the second run ends before its last operation
    pixels = random_pixels(80 + 48 + 4, enc.config)

    def step():
        enc.tower.zero_grad()
        total, images = [], pixels.clone().requires_grad_()

        def pack(tensor):
            total.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = weighted([enc(images, torch.tensor(GRIDS)).pooler_output])
        kept.append(sum(total))
        loss.backward()
        with_gradients = [one.grad for one in enc.tower.parameters() if one.grad is not None]
        gradients.append([images.grad.clone(), *(one.clone() for one in with_gradients)])

    assert not enc.tower.gradient_checkpointing
    step()
    assert len(runs) == depth
    enc.tower.gradient_checkpointing = True
    step()
    assert len(runs) == 3 * depth
    assert kept[1] < 0.5 * kept[0]
    assert len(gradients[0]) > 20
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    with torch.no_grad():
        enc(pixels, torch.tensor(GRIDS))
    assert len(runs) == 4 * depth


def test_the_saliency_example_finds_the_pixels_of_its_token(tmp_path, monkeypatch, capsys):
    out = tmp_path / "saliency.png"
    source = ROOT / "scripts/pictures/shapes.png"
    options = ["--token", "3,5", "--max-tokens", "80", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["saliency.py", str(source), *options])
    with pytest.warns(UserWarning, match="random weights"):
        found = runpy.run_path(str(ROOT / "scripts/examples/saliency.py"))
    saliency, (rows, columns, _) = found["saliency"], found["tokens"].shape
    assert rows * columns <= 80
    assert saliency.shape == Image.open(source).size[::-1]
    height, width = saliency.shape
    # Bicubic interpolation reads a few pixels beyond the token's own, which the middle of its cell leaves out.
    own = saliency[3 * height // rows : 4 * height // rows, 5 * width // columns : 6 * width // columns]
    assert own.mean() > 5 * saliency.mean()
    assert found["moved"]["gradient"] > 3 * found["moved"]["random"]
    assert Image.open(out).width > 2 * 400
    assert "gradient [3," in capsys.readouterr().out
