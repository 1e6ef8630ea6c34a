"""Which graph runs a batch, without CUDA: a shared one or one of its own, and which are dropped."""

import random
import subprocess
import sys

import torch

from qwenvit.graphs import graphed_tower, sharing
from qwenvit.graphs.capacity import Capacity, capacity_for, coarse_capacity, pool_patches_for
from qwenvit.graphs.graphed_tower import GraphedTower
from qwenvit.plan.inputs import check_grid
from support.graphs_on_cpu import captured, cpu_tower, images, replayed


def test_a_new_capacity_shares_a_coarse_graph_until_it_comes_twice_in_a_row(calls):
    tower = cpu_tower()
    graphs, need = GraphedTower(tower), lambda side: Capacity(side * side, 1, 0, 1, side)
    fine = {side: capacity_for(need(side), 4) for side in (40, 42, 64)}
    coarse = coarse_capacity(fine[40], 4)
    assert coarse == coarse_capacity(fine[42], 4)
    assert len({coarse, *fine.values()}) == 4
    images(graphs, 64)  # the first of all gets a graph of its own, and the pool's
    assert captured(calls) == [pool_patches_for(1)]
    images(graphs, 40, 42, 40, 64, 42)
    assert captured(calls)[1:] == [coarse.patches]
    images(graphs, 40, 40, 40)
    assert captured(calls)[2:] == [fine[40].patches]
    own, pool = fine[40].patches, fine[64].patches
    shared = coarse.patches
    assert replayed(calls) == [pool, shared, shared, shared, pool, shared, shared, own, own]


def test_a_capacity_that_comes_often_gets_a_graph_of_its_own(calls):
    tower = cpu_tower()
    graphs, own = GraphedTower(tower), capacity_for(Capacity(1600, 1, 0, 1, 40), 4).patches
    images(graphs, 64, *(40, 42) * (sharing.OCCURRENCES_BEFORE_CAPTURE - 1))
    assert own not in captured(calls)
    images(graphs, 40)
    assert captured(calls)[-1] == own
    assert replayed(calls)[-1] == own


def test_in_fp32_every_capacity_has_a_graph_of_its_own(calls):
    """There an image's bits depend on the capacity, and must not depend on what came before."""
    tower = cpu_tower(dtype=torch.float32)
    images(GraphedTower(tower), 64, 40, 42)
    own = [capacity_for(Capacity(side**2, 1, 0, 1, side), 4).patches for side in (64, 40, 42)]
    assert replayed(calls) == own


def test_the_least_recently_used_graph_is_dropped(calls, monkeypatch):
    monkeypatch.setattr(graphed_tower, "MAX_GRAPHS", 3)
    tower = cpu_tower(dtype=torch.float32)  # each size has a graph of its own
    graphs = GraphedTower(tower)
    images(graphs, 64, 40, 42)
    images(graphs, 64, 40)  # 42 is now the least recently used
    images(graphs, 44)
    kept = len(captured(calls))
    images(graphs, 64, 40, 44, 64)
    assert len(captured(calls)) == kept
    images(graphs, 42)  # in place of 40
    images(graphs, 44, 64, 42)
    assert len(captured(calls)) == kept + 1
    images(graphs, 40)
    assert len(captured(calls)) == kept + 2
    assert len(graphs._graphs) == 3


def test_many_sizes_that_come_once_share_few_graphs(calls, monkeypatch):
    """The stub checks that each batch fits in its graph; the GPU tests, that the results are right."""
    monkeypatch.setattr(sharing, "MAX_COUNTED_CAPACITIES", 50)
    tower, rng = cpu_tower(), random.Random(0)
    graphs = GraphedTower(tower)
    for _ in range(250):
        items = [[rng.choice((1, 1, 1, 3)), 2 * rng.randint(1, 36), 2 * rng.randint(1, 36)]]
        items *= rng.choice((1, 1, 2))
        grid = check_grid(items, 2)
        graphs(torch.zeros(grid.patches, 1), grid)
        assert len(graphs._sharing[()]._occurrences) <= 50
    assert len(replayed(calls)) == 250
    assert len(captured(calls)) < 100


def test_both_torch_settings_of_tf32_are_read():
    """torch raises if the older setting is read after the newer one was set."""
    code = """if True:
        import torch; from types import SimpleNamespace; {}; from qwenvit.graphs.graphed_tower import GraphedTower
        print(GraphedTower._graph_key(SimpleNamespace(_is_fp32=True), 'capacity')[:2])
    """
    for choice in ("torch.set_float32_matmul_precision('high')", "torch.backends.cuda.matmul.fp32_precision = 'tf32'"):
        done = subprocess.run([sys.executable, "-c", code.format(choice)], capture_output=True, text=True, check=True)
        assert done.stdout == "('capacity', 'tf32')\n"
