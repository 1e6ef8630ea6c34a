"""Tiny models, which every test leaves bitwise as they were, and the towers that use_tower puts into them."""

import functools

import pytest
import torch

from qwenvit.integrations.transformers import tower as integration
from qwenvit.towers.fast import FastTower
from support.tiny_models import CLASSES, build_wide, visual


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: at these sizes, several threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models():
    return {family: build_wide(family) for family in CLASSES}


@pytest.fixture(params=CLASSES)
def model(request, models):
    """A model of each family; the test must leave it bitwise as it was."""
    model = models[request.param]
    before = snapshot(model)
    yield model
    assert_unchanged(model, before)


@pytest.fixture
def qwen2_5(models):
    """Qwen2.5-VL's model, of whose weights the fast tower packs the most."""
    model = models["qwen2_5_vl"]
    before = snapshot(model)
    yield model
    assert_unchanged(model, before)


@pytest.fixture(params=["reference", "fast"])
def impl(request, monkeypatch):
    """The implementation to ask for; the fast tower's operations are plain torch's, so that it runs on the CPU."""
    if request.param == "fast":
        fast_tower(monkeypatch)
        return "triton"
    return "reference"


@pytest.fixture
def fast(monkeypatch):
    return fast_tower(monkeypatch)


def fast_tower(monkeypatch):
    monkeypatch.setattr(integration, "tower_class", lambda *_: functools.partial(FastTower, impl="reference"))
    return "triton"


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return state, flags, attributes(visual(model)), list(model.parameters())


def attributes(module):
    return set(vars(module)) - {"_output_capturing_hooks_installed"}


def assert_unchanged(model, before):
    state, flags, names, parameters = before
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert attributes(visual(model)) == names
    assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))
