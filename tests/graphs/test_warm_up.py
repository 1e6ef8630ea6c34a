"""Warming up, without CUDA: it captures the graphs that images then use."""

import pytest

from qwenvit.graphs.capacity import Capacity, capacity_for
from qwenvit.graphs.graphed_tower import GraphedTower
from support.graphs_on_cpu import captured, cpu_tower, images, replayed, states


def test_warming_up_captures_what_images_then_use(calls):
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    count = graphs.warm_up(1000)
    assert len(captured(calls)) == count + 1  # and the one that sizes the pool
    images(graphs, 2, 8, 18, 30)
    assert len(captured(calls)) == count + 1
    assert replayed(calls) == [capacity_for(Capacity(side**2, 1, 0, 1, side), 4).patches for side in (2, 8, 18, 30)]


def test_warming_up_for_layers_captures_what_their_calls_use(calls):
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    count = graphs.warm_up(1000, (0, 1))
    captures = len(captured(calls))
    assert captures == count + 1
    assert {key.layers for key in graphs._graphs} == {(0, 1)}
    states(graphs, (0, 1), 2, 8, 18, 30)
    assert len(captured(calls)) == captures


@pytest.mark.parametrize("patches", [4, 320, 324, 1000, 2052, 4096])
def test_warming_up_captures_every_image_up_to_its_bound(calls, patches):
    """The capacities are those of all images one by one."""
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    graphs.warm_up(patches)
    own = {capacity_for(Capacity(size, 1, 0, 1, 1), 4) for size in range(4, patches + 1, 4)}
    assert own <= {key.capacity for key in graphs._graphs}
