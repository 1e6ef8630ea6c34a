"""CUDA graphs of the fast tower without CUDA: capacities, lifetimes, moved weights."""

import contextlib
import copy
import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenvit.graphs.capacity import Capacity, capacity_for, pool_patches_for
from qwenvit.graphs.graphed_tower import CAPTURE_LOCK, GraphedTower, graphs_of
from qwenvit.plan.inputs import check_grid
from qwenvit.towers.fast import FastTower
from support.towers import narrow


@given(st.integers(1, 2**15), st.integers(1, 900), st.integers(0, 9000), st.integers(1, 900), st.integers(1, 3000))
def test_a_capacity_covers_what_is_needed_and_little_more(tokens, frames, windows, items, side):
    need = Capacity(4 * tokens, frames, windows, items, side)
    capacity = capacity_for(need, 4)
    for name in ("patches", "frames", "windows", "items", "side"):
        assert getattr(capacity, name) >= getattr(need, name)
    assert capacity.patches % 4 == 0
    assert capacity.patches - need.patches < max(16, need.patches / 32)
    rounded = need._replace(patches=capacity.patches, frames=capacity.frames, items=capacity.items)
    assert capacity_for(rounded, 4) == capacity
    assert capacity.windows <= max(2 * windows, capacity.patches // 48 + 16)


@pytest.fixture
def no_cuda(monkeypatch):
    """Replace torch.cuda by stubs of what `GraphedTower` calls while no graph is captured or replayed."""
    stub = SimpleNamespace(
        device=contextlib.nullcontext, Stream=Mock(), Event=Mock(), synchronize=Mock(), is_current_stream_capturing=bool
    )
    monkeypatch.setattr(torch, "cuda", stub)
    return stub


def cpu_tower():
    return FastTower(narrow("qwen2_vl", depth=1, intermediate_size=320, out_hidden_size=8))


def pretend_captured(graphs, grid):
    """Put a stub in place of the graph that runs a batch."""
    graphs._graphs[graphs._graph_key(graphs._prepare(grid).capacity)] = Mock()


def test_graphs_hold_no_reference_to_themselves(no_cuda):
    """With a reference cycle, their memory would stay allocated until Python's garbage collector runs."""
    tower = cpu_tower()
    tower.graphs = GraphedTower(tower)
    watched = weakref.ref(tower.graphs)
    gc.disable()
    try:
        tower.graphs = None
        assert watched() is None
        tower.graphs, alive = GraphedTower(tower), weakref.ref(tower)
        del tower
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("captured", [True, False])
def test_moved_weights_are_found_before_a_capture_and_after_a_replay(no_cuda, monkeypatch, captured):
    tower = cpu_tower()
    graphs, grid, runs = GraphedTower(tower), check_grid([[1, 4, 4]], 2), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    monkeypatch.setattr(graphs, "_run", lambda *_: runs.append(graphs._weights.weights_unmoved()))
    if captured:
        pretend_captured(graphs, grid)
    graphs._encode(torch.zeros(16, 1), grid)
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    graphs._encode(torch.zeros(16, 1), grid)
    assert runs == ([True, False, True] if captured else [True, True])
    assert not graphs._graphs
    no_cuda.synchronize.assert_called_once_with(graphs.device)


def test_grids_without_a_key_are_told_apart(no_cuda, monkeypatch):
    """torch.compile may trace `check_grid`, which then gives no key, and run the graphs outside the trace."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    for size in ([1, 4, 8], [1, 8, 4]):
        grid = check_grid([size], 2)
        assert torch.equal(graphs._prepare(grid._replace(key=b"")).table, graphs._prepare(grid).table)
        assert graphs._prepare(grid).table[0, 3:].tolist() == size[1:]


@pytest.mark.parametrize("captured", [True, False])
def test_hooks_are_refused_and_not_captured(no_cuda, monkeypatch, captured):
    tower = cpu_tower()
    graphs, grid, runs = GraphedTower(tower), check_grid([[1, 4, 4]], 2), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    monkeypatch.setattr(graphs, "_run", lambda *_: runs.append(1))
    if captured:
        pretend_captured(graphs, grid)
    handle = tower.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no forward hooks"):
        graphs._encode(torch.zeros(16, 1), grid)
    assert len(runs) == captured  # a replay whose result is dropped, but no capture
    handle.remove()
    graphs._encode(torch.zeros(16, 1), grid)
    assert len(runs) == captured + 1


def test_a_move_that_fails_halfway_leaves_no_graphs(no_cuda):
    """Old graphs would read memory that is no longer allocated to the weights."""
    tower = cpu_tower()
    tower.graphs = GraphedTower(tower)

    def convert(x):
        if x is tower.merger.fc2.weight:
            raise MemoryError("no memory")
        return x.double()

    with pytest.raises(MemoryError):
        tower._apply(convert)
    assert tower.graphs is None


def test_no_thread_synchronizes_with_the_gpu_during_a_capture(no_cuda):
    tower = cpu_tower()
    tower.graphs = GraphedTower(tower)
    no_cuda.synchronize.side_effect = lambda _: locked.append(CAPTURE_LOCK.locked())
    locked = []
    tower.double()  # calls release_memory
    graphs = GraphedTower(tower)
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    assert graphs._reset_if_weights_moved()
    assert locked == [True, True]
    assert not CAPTURE_LOCK.locked()


def test_a_shallow_copy_has_graphs_of_its_own(no_cuda, monkeypatch):
    tower = cpu_tower()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    first, twin = graphs_of(tower), copy.copy(tower)
    assert graphs_of(tower) is first
    assert twin.graphs is first
    assert graphs_of(twin).tower is twin


def test_both_torch_settings_of_tf32_are_read():
    """torch raises if the older setting is read after the newer one was set."""
    code = """if True:
        import torch; from types import SimpleNamespace; {}; from qwenvit.graphs.graphed_tower import GraphedTower
        print(GraphedTower._graph_key(SimpleNamespace(_is_fp32=True), 'capacity'))
    """
    for choice in ("torch.set_float32_matmul_precision('high')", "torch.backends.cuda.matmul.fp32_precision = 'tf32'"):
        done = subprocess.run([sys.executable, "-c", code.format(choice)], capture_output=True, text=True, check=True)
        assert done.stdout == "('capacity', 'tf32')\n"


@given(st.integers(1, 2**15))
def test_the_graph_that_sizes_the_pool_is_little_larger_than_needed(patches):
    assert patches <= pool_patches_for(patches) <= max(4096, patches * 9 / 8)
