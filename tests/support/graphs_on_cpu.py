"""A small fast tower on the CPU, and calls of its graphs, which the tests replace by stubs."""

import torch

from qwenvit.plan.inputs import check_grid
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.towers import narrow


def cpu_tower(impl="triton", dtype=torch.bfloat16):
    """Return a small tower with weights: those of a new one are whatever was in memory, at times NaN."""
    tower = FastTower(narrow("qwen2_vl", depth=1, intermediate_size=320, out_hidden_size=8), impl)
    tower.load_state_dict(ReferenceTower(tower.config).state_dict())
    return tower.to(dtype)


def images(graphs, *sides):
    """Run one square image after another, and return the patches of the graphs that ran them."""
    for side in sides:
        graphs(torch.zeros(side * side, 1), check_grid([[1, side, side]], 2))


def states(graphs, layers, *sides):
    """Ask for hidden states of one square image after another."""
    for side in sides:
        found = graphs.hidden_states(torch.zeros(side * side, 1), check_grid([[1, side, side]], 2), layers, False)
        assert [len(state) for state in found] == [side * side] * len(layers)


def replayed(calls):
    return [call[1] for call in calls if call[0] == "replayed"]


def captured(calls):
    return [call[1] for call in calls if call[0] == "captured"]
