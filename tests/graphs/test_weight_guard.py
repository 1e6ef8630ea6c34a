"""The weight guard notices moved, converted and replaced weights, and no others."""

import copy

import pytest
import torch
from torch import nn

from qwenvit.graphs.weight_guard import WeightGuard


def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))


CHANGES = {
    "converted": lambda parts: parts.half(),
    "moved": lambda parts: parts.to("meta"),
    "converted in part": lambda parts: parts[1][1].double(),
    "another parameter": lambda parts: setattr(parts[0], "weight", nn.Parameter(torch.ones(4, 3))),
    "another bias": lambda parts: setattr(parts[1][1], "bias", None),
    "another submodule": lambda parts: parts.__setitem__(0, nn.Linear(3, 4, bias=False)),
    "another submodule within": lambda parts: parts[1].__setitem__(1, copy.deepcopy(parts[1][1])),
    "loaded anew": lambda parts: parts.load_state_dict(
        {name: x.clone() for name, x in parts.state_dict().items()}, assign=True
    ),
    "read as another dtype": lambda parts: setattr(parts[0].weight, "data", parts[0].weight.data.view(torch.int32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    parts = module().requires_grad_(False)
    guard = WeightGuard(parts)
    assert guard.weights_unmoved()
    CHANGES[change](parts)
    assert not guard.weights_unmoved()
    assert WeightGuard(parts).weights_unmoved()


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("part", [lambda parts: parts, lambda parts: parts[1][0]])
def test_hooks_are_refused_until_they_are_removed(register, part):
    parts = module()
    guard = WeightGuard(parts)
    guard.refuse_hooks()
    handle = getattr(part(parts), register)(lambda *_: None)
    with pytest.raises(ValueError, match=r"no forward hooks, which CUDA graphs leave out; use impl='reference'"):
        guard.refuse_hooks()
    assert guard.weights_unmoved()
    handle.remove()
    guard.refuse_hooks()


def test_new_values_at_the_same_addresses_are_no_change():
    parts = module()
    guard = WeightGuard(parts)
    parts.load_state_dict({name: torch.ones_like(x) for name, x in parts.state_dict().items()})
    parts.to("cpu", torch.float32).requires_grad_(False).eval()
    assert guard.weights_unmoved()
    assert list(map(id, guard.parameters)) == list(map(id, parts.parameters()))
