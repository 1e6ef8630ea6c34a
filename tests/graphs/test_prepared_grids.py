"""Prepared grids: which are dropped, how they are told apart, and what a caller may overwrite."""

import torch

from qwenvit.graphs import device_plan, graphed_tower
from qwenvit.graphs.graphed_tower import GraphedTower
from qwenvit.plan.inputs import check_grid
from support.graphs_on_cpu import cpu_tower


def test_the_oldest_prepared_grids_are_dropped(no_cuda, monkeypatch):
    monkeypatch.setattr(graphed_tower, "MAX_PREPARED_GRIDS", 3)
    measured, measure = [], device_plan.measure_grids
    monkeypatch.setattr(
        device_plan, "measure_grids", lambda grid, config: measured.append(grid) or measure(grid, config)
    )
    tower = cpu_tower()
    graphs, grids = GraphedTower(tower), [check_grid([[1, side, side]], 2) for side in (2, 4, 6, 8, 10)]
    for grid in grids:
        assert graphs._prepare(grid).needed.patches == grid.patches
    for grid in grids[2:]:
        graphs._prepare(grid)
    assert len(measured) == 5
    graphs._prepare(grids[0])
    assert len(measured) == 6
    assert len(graphs._prepared) == 3


def test_grids_without_sizes_are_told_apart(no_cuda, monkeypatch):
    """`check_grid` gives none while torch.compile compiles, in any thread; the graphs may run then or later."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    tower, compiling = cpu_tower(), [False]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling[0])
    graphs = GraphedTower(tower)
    for size in ([1, 4, 8], [1, 8, 4]):
        for checked, run in ((False, False), (True, False), (True, True), (False, True)):
            compiling[0] = checked
            grid = check_grid([size], 2)
            assert bool(grid.sizes) == (not checked)
            compiling[0] = run
            prepared = graphs._prepare(grid)
            assert graphs._table(prepared, 1)[0, 3:].tolist() == size[1:]
    assert len(graphs._prepared) == 2


def test_grids_that_the_caller_overwrites_are_kept(no_cuda, monkeypatch):
    """Tables are made when they are first needed, which may be after the caller has reused the tensor."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    tower = cpu_tower()
    graphs, grid = GraphedTower(tower), torch.tensor([[1, 4, 8]])
    prepared = graphs._prepare(check_grid(grid, 2))
    grid[0, 1] = 16
    assert graphs._prepare(check_grid([[1, 4, 8]], 2)) is prepared
    assert graphs._table(prepared, 1)[0, 3:].tolist() == [4, 8]
