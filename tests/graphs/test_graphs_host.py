"""CUDA graphs of the fast tower without CUDA: capacities, lifetimes, moved weights."""

import contextlib
import copy
import gc
import pickle
import random
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenvit.graphs import device_plan, graph, graphed_tower, sharing
from qwenvit.graphs.capacity import (
    MIN_GRAPH_PATCHES,
    Capacity,
    capacity_for,
    coarse_capacity,
    pool_patches_for,
)
from qwenvit.graphs.capture import capturing, garbage_collection_paused
from qwenvit.graphs.graph import Graph, UnownedTensor, write_pixels
from qwenvit.graphs.graphed_tower import CAPTURE_LOCK, GraphedTower, graphs_of
from qwenvit.kernels.gemm.cublas import MIN_ROWS
from qwenvit.outputs import TowerOutput
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import check_grid
from qwenvit.plan.reading_order import reading_order
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.towers import narrow


@given(st.integers(1, 2**15), st.integers(1, 900), st.integers(0, 9000), st.integers(1, 900), st.integers(1, 3000))
def test_a_capacity_covers_what_is_needed_and_little_more(tokens, frames, windows, items, side):
    need = Capacity(4 * tokens, frames, windows, items, side)
    capacity = capacity_for(need, 4)
    for name in ("patches", "frames", "windows", "items", "side"):
        assert getattr(capacity, name) >= getattr(need, name)
    assert capacity.patches % 4 == 0
    assert capacity.patches == MIN_GRAPH_PATCHES or capacity.patches - need.patches < max(16, need.patches / 32)
    assert capacity.patches >= MIN_ROWS  # or every product in the graph would copy its input to pad it
    rounded = need._replace(patches=capacity.patches, frames=capacity.frames, items=capacity.items)
    assert capacity_for(rounded, 4) == capacity
    assert capacity.windows <= max(2 * windows, capacity.patches // 48 + 16)


@given(st.integers(1, 2**13), st.integers(0, 900), st.integers(1, 3000))
def test_one_frame_stays_one(tokens, windows, side):
    """Attention splits one segment best when it knows that there is only one; a coarse graph too has one."""
    one = capacity_for(Capacity(4 * tokens, 1, windows, 1, side), 4)
    assert (one.frames, one.items) == (1, 1)
    coarse = coarse_capacity(one, 4)
    assert (coarse.frames, coarse.items) == (1, 1)
    video = capacity_for(Capacity(4 * tokens, 2, windows, 1, side), 4)
    assert video.frames > 1
    assert video.items == 1


@pytest.fixture
def no_cuda(monkeypatch):
    """Replace torch.cuda by stubs of what `GraphedTower` calls while no graph is captured or replayed."""
    stub = SimpleNamespace(
        device=contextlib.nullcontext,
        Stream=Mock(),
        Event=Mock(),
        current_stream=Mock(),
        synchronize=Mock(),
        is_current_stream_capturing=bool,
    )
    monkeypatch.setattr(torch, "cuda", stub)
    return stub


def cpu_tower(impl="triton", dtype=torch.bfloat16):
    """Return a small tower with weights: those of a new one are whatever was in memory, at times NaN."""
    tower = FastTower(narrow("qwen2_vl", depth=1, intermediate_size=320, out_hidden_size=8), impl)
    tower.load_state_dict(ReferenceTower(tower.config).state_dict())
    return tower.to(dtype)


def pretend_captured(graphs, grid):
    """Put a stub in place of the graph that runs a batch."""
    capacity = graphs._prepare(grid).capacity
    graphs._graphs[graphs._graph_key(capacity)] = Mock(capacity=capacity)


@pytest.fixture
def calls(no_cuda, monkeypatch):
    """Return a list of the captures and replays, which are stubs."""
    made = []

    class StubGraph:
        def __init__(self, *arguments):
            self.capacity, self.layers = arguments[1], arguments[6]
            made.append(("captured", self.capacity.patches, self.layers))

        def replay_states(self, table, pixel_values, patches, order):
            assert self.layers
            assert len(order()) == patches
            StubGraph.replay(self, table, pixel_values, patches)
            return [torch.zeros(patches, 1)] * len(self.layers)

        def replay(self, table, pixel_values, patches):
            assert len(table) == self.capacity.items + 1
            assert patches <= self.capacity.patches
            made.append(("replayed", self.capacity.patches, pixel_values, self.layers))

    no_cuda.graph_pool_handle = Mock()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    monkeypatch.setattr(graphed_tower, "Graph", StubGraph)
    return made


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", ["the pool's", "a later one"])
def test_after_a_failed_capture_the_next_gets_a_new_pool(calls, no_cuda, monkeypatch, error, failing):
    """torch may refuse captures in the pool of a failed one."""
    pools, fails = [], [failing == "the pool's"]

    class FailingGraph(graphed_tower.Graph):
        def __init__(self, *arguments):
            pools.append(arguments[4])
            if fails[0]:
                raise error
            super().__init__(*arguments)

    no_cuda.graph_pool_handle = object
    monkeypatch.setattr(graphed_tower, "Graph", FailingGraph)
    tower = cpu_tower(dtype=torch.float32)
    graphs = GraphedTower(tower)
    if not fails[0]:
        images(graphs, 64, 40)
        assert pools[0] is pools[1]
        fails[0] = True
    with pytest.raises(error):
        images(graphs, 42)
    assert not graphs._lock.locked()
    assert not CAPTURE_LOCK.locked()
    failed, fails[0] = len(pools), False
    images(graphs, 42, 40)
    assert len({id(pool) for pool in pools[failed:]}) == 1
    assert pools[failed] not in pools[:failed]
    assert replayed(calls)[-2:] == [capacity_for(Capacity(side**2, 1, 0, 1, side), 4).patches for side in (42, 40)]


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


@pytest.mark.parametrize("sides", [(40,), (64, 40)])
def test_weights_that_moved_between_two_meetings(calls, sides):
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, *sides)
    old = set(graphs._graphs.values())
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    images(graphs, 40)
    assert not old & set(graphs._graphs.values())
    assert graphs._graphs
    assert graphs._weights.weights_unmoved()


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


def test_pixel_values_reach_the_graph_as_they_are(calls):
    tower = cpu_tower()
    for pixel_values in (torch.zeros(16, 1), torch.Tensor.zero_):
        GraphedTower(tower)(pixel_values, check_grid([[1, 4, 4]], 2))
        assert calls[-1][2] is pixel_values


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_waits_for_the_one_before_on_the_gpu(calls, no_cuda, fails):
    """Its work starts after the event of the last call, and its own event is recorded even after a failure."""
    streams = [Mock(), Mock()]
    no_cuda.Event = lambda: SimpleNamespace(record=lambda stream: calls.append(("recorded", stream)))
    for stream in streams:
        stream.wait_event.side_effect = lambda event, stream=stream: calls.append(("waited", stream, event))
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    event = graphs._last_call_done
    for stream in streams:
        no_cuda.current_stream.return_value = stream
        images(graphs, 4)
    first, second = ([call for call in calls if call[0] != "captured"][start : start + 3] for start in (0, 3))
    for made, stream in zip((first, second), streams, strict=True):
        assert made[0] == ("waited", stream, event)
        assert made[1][0] == "replayed"
        assert made[2] == ("recorded", stream)
    if fails:
        for stub in graphs._graphs.values():
            stub.replay = Mock(side_effect=MemoryError)
        with pytest.raises(MemoryError):
            images(graphs, 4)
        assert calls[-1] == ("recorded", streams[1])


def test_calls_of_several_threads_run_one_after_another(calls, monkeypatch):
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, 4, 4)
    running, together = [], []

    def replay(*_):
        running.append(1)
        time.sleep(0.01)
        together.append(len(running))
        running.pop()

    for stub in graphs._graphs.values():
        monkeypatch.setattr(stub, "replay", replay)
    threads = [threading.Thread(target=images, args=(graphs, 4, 4)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 8


def test_one_capture_at_a_time_in_a_process(calls, monkeypatch):
    towers = [cpu_tower() for _ in range(3)]
    capturing_now, together = [], []

    class SlowGraph(graphed_tower.Graph):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            capturing_now.append(1)
            time.sleep(0.01)
            together.append(len(capturing_now))
            capturing_now.pop()

    monkeypatch.setattr(graphed_tower, "Graph", SlowGraph)
    threads = [threading.Thread(target=images, args=(GraphedTower(tower), 4, 8, 12)) for tower in towers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) >= 6
    assert set(together) == {1}


def test_a_batch_too_large_for_a_graph_takes_pixel_values_or_a_callable(no_cuda, monkeypatch):
    no_cuda.current_stream = Mock()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    monkeypatch.setattr(graphed_tower, "MAX_GRAPH_PATCHES", 8)
    tower = cpu_tower(impl="reference")
    grid, pixels = [[1, 4, 4], [1, 2, 6]], torch.randn(28, tower.config.patch_dim)
    expected = tower(pixels, GridPlan.build(grid, tower.config, "cpu"))
    for pixel_values in (pixels, lambda rows: rows.copy_(pixels)):
        output = GraphedTower(tower)(pixel_values, check_grid(grid, 2))
        torch.testing.assert_close(output.pooler_output, expected.pooler_output)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)


def test_pixel_values_are_copied_or_written_to_the_rows():
    rows, pixels = torch.full((4, 6), torch.nan), torch.randn(4, 6)
    for pixel_values in (pixels, pixels.double(), lambda out: out.copy_(pixels)):
        rows.fill_(torch.nan)
        write_pixels(rows, pixel_values)
        assert torch.equal(rows, pixels)


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
    for name in ("_run", "_replay"):
        monkeypatch.setattr(graphs, name, lambda *_: runs.append(graphs._weights.weights_unmoved()))
    if captured:
        pretend_captured(graphs, grid)
    graphs._encode(torch.zeros(16, 1), grid)
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    graphs._encode(torch.zeros(16, 1), grid)
    assert runs == ([True, False, True] if captured else [True, True])
    assert not graphs._graphs
    no_cuda.synchronize.assert_called_once_with(graphs.device)


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


def test_no_stale_graph_is_left_when_the_next_is_captured(calls, monkeypatch):
    """It would keep the pool allocated that it shared, beside the new one."""
    alive = []

    class WatchedGraph(graphed_tower.Graph):
        def __init__(self, *arguments):
            assert not [graph for graph in alive if graph() is not None]
            alive.append(weakref.ref(self))
            super().__init__(*arguments)

    monkeypatch.setattr(graphed_tower, "Graph", WatchedGraph)
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, 64, 64)
    tower.merger.fc1.weight.data = tower.merger.fc1.weight.data.clone()
    images(graphs, 64)
    assert len(alive) == len(captured(calls)) == 2


@pytest.mark.parametrize("captured", [True, False])
def test_hooks_are_refused_and_not_captured(no_cuda, monkeypatch, captured):
    tower = cpu_tower()
    graphs, grid, runs = GraphedTower(tower), check_grid([[1, 4, 4]], 2), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    for name in ("_run", "_replay"):
        monkeypatch.setattr(graphs, name, lambda *_: runs.append(1))
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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_copies_start_without_graphs(no_cuda, duplicate):
    tower = cpu_tower()
    tower.graphs = GraphedTower(tower)
    twin = duplicate(tower)
    assert twin.graphs is None
    assert tower.graphs.tower is tower
    assert torch.equal(twin.patch_embed.weight, tower.patch_embed.weight)


def test_a_shallow_copy_has_graphs_of_its_own(no_cuda, monkeypatch):
    tower = cpu_tower()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    first, twin = graphs_of(tower), copy.copy(tower)
    assert graphs_of(tower) is first
    assert twin.graphs is first
    assert graphs_of(twin).tower is twin


@pytest.mark.parametrize("replaced", [True, False])
def test_a_tower_whose_weights_left_the_gpu_has_no_graphs(no_cuda, monkeypatch, replaced):
    """Whether they were replaced, as by `load_state_dict(..., assign=True)`, or moved where they are."""
    tower = cpu_tower()
    on_gpu = {id(parameter) for parameter in tower.parameters()}
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: id(tensor) in on_gpu))
    graphs, weight = graphs_of(tower), tower.patch_embed.weight
    assert graphs_of(tower) is graphs is not None
    if replaced:
        tower.patch_embed.weight = torch.nn.Parameter(weight.clone())
    else:
        on_gpu.remove(id(weight))
    assert graphs_of(tower) is None
    tower.patch_embed.weight = weight
    on_gpu.add(id(weight))
    assert graphs_of(tower) is graphs


def test_both_torch_settings_of_tf32_are_read():
    """torch raises if the older setting is read after the newer one was set."""
    code = """if True:
        import torch; from types import SimpleNamespace; {}; from qwenvit.graphs.graphed_tower import GraphedTower
        print(GraphedTower._graph_key(SimpleNamespace(_is_fp32=True), 'capacity')[:2])
    """
    for choice in ("torch.set_float32_matmul_precision('high')", "torch.backends.cuda.matmul.fp32_precision = 'tf32'"):
        done = subprocess.run([sys.executable, "-c", code.format(choice)], capture_output=True, text=True, check=True)
        assert done.stdout == "('capacity', 'tf32')\n"


@given(st.integers(1, 2**15))
def test_the_graph_that_sizes_the_pool_is_little_larger_than_needed(patches):
    assert patches <= pool_patches_for(patches) <= max(4096, patches * 9 / 8)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_paused_during_a_capture_and_then_as_before(enabled, fails):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        for _ in range(2):
            with pytest.raises(MemoryError) if fails else contextlib.nullcontext(), garbage_collection_paused():
                assert not gc.isenabled()
                if fails:
                    raise MemoryError
            assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.fixture
def make_graph(no_cuda, monkeypatch):
    """Return a function that makes a graph of a tower; the capture runs on the CPU, and replays do nothing.

    Its argument `transform` replaces the tower's, if there is one. The graph has a stub for CUDA's in `graph`.
    """
    no_cuda.CUDAGraph, no_cuda.stream, no_cuda.device_of = Mock(), contextlib.nullcontext, contextlib.nullcontext
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    monkeypatch.setattr(UnownedTensor, "of", lambda x: SimpleNamespace(tensor=lambda _: x))

    def make(tower, transform=None, run_first=False, layers=()):
        monkeypatch.setattr(tower, "transform", transform)
        capacity = capacity_for(Capacity(16, 1, 0, 1, 4), 4)
        angles = device_plan.angle_tables(tower.config, 512, "cpu")
        with torch.no_grad():
            return Graph(tower, capacity, angles, "stream", "pool", run_first, layers)

    return make


@pytest.mark.parametrize("run_first", [True, False])
def test_garbage_is_collected_around_a_capture_but_not_during_one(no_cuda, monkeypatch, make_graph, run_first):
    """CUDA aborts a capture during which another graph is freed; workspaces are reserved in a capture of their own."""
    steps = []
    monkeypatch.setattr(graph, "reserve_workspaces", lambda *arguments: steps.append((arguments[0], gc.isenabled())))

    def transform(x, plan):
        steps.append((no_cuda.CUDAGraph.return_value.capture_begin.called, gc.isenabled()))
        return TowerOutput(x, x, [])

    made = make_graph(cpu_tower("reference"), transform, run_first)
    assert steps == [(False, True)] * run_first + [("stream", False), (True, False)]
    assert made.graph.capture_begin.call_args.kwargs["pool"] == "pool"
    assert made.graph.capture_end.called
    assert gc.isenabled()


def test_a_replay_reads_the_table_of_its_batch(monkeypatch, make_graph):
    monkeypatch.setattr(graph, "reserve_workspaces", Mock())
    made = make_graph(cpu_tower("reference", torch.float32), lambda x, _: TowerOutput(x, x[::4].clone(), []))
    seen = []
    monkeypatch.setattr(made.graph, "replay", lambda: seen.append(made.table.clone()))
    first, second = torch.full_like(made.table, 1), torch.full_like(made.table, 2)
    rows = torch.zeros(16, made.pixel_values.shape[1])
    order = [first, first, second, second, first]
    for table in order:
        made.replay(table, rows, 16)
    assert all(map(torch.equal, seen, order))
    # A table whose copy failed is copied again, even if it is the one from before.
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", Mock(side_effect=RuntimeError("copy")))
        with pytest.raises(RuntimeError, match="copy"):
            made.replay(second, rows, 16)
    made.table.fill_(3)  # what a copy that failed halfway may leave
    made.replay(first, rows, 16)
    assert torch.equal(seen[-1], first)


@pytest.mark.parametrize("deepstack", [0, 3])
def test_a_replay_returns_copies_of_the_rows_of_the_batch(monkeypatch, make_graph, deepstack):
    monkeypatch.setattr(graph, "reserve_workspaces", Mock())
    captured = []

    def transform(x, plan):
        captured.extend([torch.randn_like(x), *(torch.randn(len(x) // 4, 24) for _ in range(1 + deepstack))])
        return TowerOutput(captured[0], captured[1], captured[2:])

    made = make_graph(cpu_tower("reference", torch.float32), transform)
    table = torch.zeros_like(made.table)
    for patches in (16, 40, len(captured[0])):
        output = made.replay(table, torch.zeros(patches, made.pixel_values.shape[1]), patches)
        outputs = [output.last_hidden_state, output.pooler_output, *output.deepstack_features]
        for copied, x, rows in zip(outputs, captured, [patches, *[patches // 4] * (1 + deepstack)], strict=True):
            assert torch.equal(copied, x[:rows])
            assert copied.untyped_storage().nbytes() == copied.nbytes
            assert copied.data_ptr() != x.data_ptr()


def test_an_error_in_a_capture_is_raised_itself():
    """torch says of the capture only that it is invalid."""
    graph = Mock()
    graph.capture_end.side_effect = RuntimeError("capture invalidated")
    with pytest.raises(MemoryError), capturing(graph, None):
        raise MemoryError
    assert graph.capture_end.called
    with pytest.raises(RuntimeError, match="invalidated"), capturing(graph, None):
        pass


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 1, 3), (1, 2, 3)])
def test_a_graph_of_layers_keeps_each_before_the_blocks_overwrite_it(monkeypatch, make_graph, layers):
    """It runs no block after the deepest layer, and no merger; a replay returns the batch's rows in the order asked."""
    monkeypatch.setattr(graph, "reserve_workspaces", Mock())
    config = narrow("qwen2_5_vl", depth=3, out_hidden_size=8)
    tower = FastTower(config, "reference")
    tower.load_state_dict(ReferenceTower(config).state_dict())
    first, blocks = torch.randn(320, config.hidden_size), []
    plan = GridPlan.build([[1, 16, 20]], config)  # of the graph's capacity: plain torch attends within whole segments
    monkeypatch.setattr(device_plan, "compute_plan", lambda *_: plan)
    monkeypatch.setattr(tower, "embed", lambda *_: first.clone())
    for index, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_, index=index: blocks.append(index))
    for merger in (tower.merger, *tower.deepstack_mergers):
        monkeypatch.setattr(merger, "forward", Mock(side_effect=AssertionError("merger")))
    made = make_graph(tower, layers=layers)
    assert blocks == list(range(layers[-1]))
    expected, x = [first], first.clone()
    with torch.no_grad():
        for index in range(3):
            x = tower.apply_block(index, x.clone(), plan)
            expected.append(x)
    order = torch.randperm(40)
    found = made.replay_states(torch.zeros_like(made.table), torch.zeros(40, config.patch_dim), 40, lambda: order)
    assert made.graph.replay.called
    for layer, state in zip(layers, found, strict=True):
        assert torch.equal(state, expected[layer][:40][order]), layer
        assert state.untyped_storage().nbytes() == state.nbytes


def test_layers_have_graphs_of_their_own(calls):
    """And counts of their own: what comes twice in a row is the same size with the same layers."""
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, 64)
    whole = dict(graphs._graphs)
    for layers in ((1,), (0, 1), (0,)):
        states(graphs, layers, 64, 64, 40, 42)
        images(graphs, 64)
    assert {key: graphs._graphs[key] for key in whole} == whole
    for call in calls:
        if call[0] == "replayed":
            assert call[3] in ((), (1,), (0, 1), (0,))
    ran = [call[3] for call in calls if call[0] == "replayed"]
    assert ran == [()] + [(1,)] * 4 + [()] + [(0, 1)] * 4 + [()] + [(0,)] * 4 + [()]
    own, coarse = (capacity(Capacity(1600, 1, 0, 1, 40), 4) for capacity in (capacity_for, coarse_of))
    captures = len(captured(calls))
    images(graphs, 40)  # the same size came with layers, which counts for them alone
    assert replayed(calls)[-1] == coarse.patches
    states(graphs, (1,), 40, 40)
    assert replayed(calls)[-1] == own.patches
    assert len(captured(calls)) == captures + 2


def test_the_first_batch_of_some_layers_gets_a_graph_of_its_own(calls):
    """As the first of all does: graphs of other layers are none that it could share."""
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    images(graphs, 64)
    states(graphs, (0, 1), 40)
    assert replayed(calls)[-1] == capacity_for(Capacity(1600, 1, 0, 1, 40), 4).patches


def coarse_of(need, merge_unit):
    return coarse_capacity(capacity_for(need, merge_unit), merge_unit)


def test_the_pool_is_sized_for_layers_before_small_graphs(calls):
    """Captured in rising order, each would add memory; a whole pass has the memory of a pass that copies nothing."""
    tower = cpu_tower()
    graphs, pool = GraphedTower(tower), pool_patches_for(1)
    images(graphs, 4)
    assert [call[1:] for call in calls if call[0] == "captured"] == [(pool, ()), (MIN_GRAPH_PATCHES, ())]
    calls.clear()
    states(graphs, (1,), 4)
    states(graphs, (0,), 4)
    assert [call[1:] for call in calls if call[0] == "captured"] == [
        (MIN_GRAPH_PATCHES, (1,)), (MIN_GRAPH_PATCHES, (0,)),
    ]  # fmt: skip
    calls.clear()
    states(graphs, (0, 1), 4)
    assert [call[1:] for call in calls if call[0] == "captured"] == [(pool, (0, 1)), (MIN_GRAPH_PATCHES, (0, 1))]
    calls.clear()
    states(graphs, (1,), 80)  # a larger pool, for which all of this starts again
    assert {key.layers for key in graphs._graphs} == {(1,)}
    images(graphs, 4)
    grown = pool_patches_for(6400, grows=True)
    assert next(call[1:] for call in calls if call[0] == "captured") == (grown, (1,))
    assert (grown, ()) in [call[1:] for call in calls if call[0] == "captured"]


def test_a_pass_is_run_before_a_capture_that_goes_deeper(calls, monkeypatch):
    """It initialises libraries, which a capture may not do."""
    runs = []

    class RecordingGraph(graphed_tower.Graph):
        def __init__(self, *arguments):
            runs.append((arguments[6], arguments[5]))
            super().__init__(*arguments)

    monkeypatch.setattr(graphed_tower, "Graph", RecordingGraph)
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    states(graphs, (0,), 64)
    states(graphs, (0, 1), 64)
    images(graphs, 64)
    states(graphs, (1,), 64)
    assert [run for run in runs if run[1]] == [((0,), True), ((0, 1), True), ((), True)]


def test_weights_that_moved_are_found_when_layers_are_asked_for(calls):
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    states(graphs, (1,), 40, 40)
    old = set(graphs._graphs.values())
    weight = tower.blocks[0].attn.qkv.weight
    weight.data = weight.data.clone()
    states(graphs, (1,), 40)
    assert not old & set(graphs._graphs.values())
    tower.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no forward hooks"):
        states(graphs, (1,), 40)


@pytest.mark.parametrize("by_token", [False, True])
def test_layers_of_a_batch_too_large_for_a_graph(no_cuda, monkeypatch, by_token):
    no_cuda.current_stream = Mock()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    monkeypatch.setattr(graphed_tower, "MAX_GRAPH_PATCHES", 8)
    config = narrow("qwen2_5_vl", depth=3, out_hidden_size=8)
    tower = FastTower(config, "reference")
    tower.load_state_dict(ReferenceTower(config).state_dict())
    grid, pixels = check_grid([[1, 12, 10], [2, 4, 6]], 2), torch.randn(168, config.patch_dim)
    expected = tower(pixels, GridPlan.build(grid, config)).last_hidden_state
    order = reading_order(grid.tensor, config, by_token)
    for pixel_values in (pixels, lambda rows: rows.copy_(pixels)):
        first, last = GraphedTower(tower).hidden_states(pixel_values, grid, (0, 3), by_token)
        torch.testing.assert_close(last, expected[order])
        torch.testing.assert_close(first, tower.embed(pixels, GridPlan.build(grid, config))[order])


def test_reading_orders_and_counts_are_bounded(calls, monkeypatch):
    monkeypatch.setattr(graphed_tower, "MAX_READING_ORDERS", 3)
    monkeypatch.setattr(graphed_tower, "MAX_COUNTED_LAYERS", 2)
    computed, compute = [], reading_order
    monkeypatch.setattr(graphed_tower, "reading_order", lambda *arguments: computed.append(1) or compute(*arguments))
    tower = cpu_tower()
    graphs = GraphedTower(tower)
    states(graphs, (1,), 4, 6, 8, 8, 6)
    assert len(computed) == 3
    graphs.hidden_states(torch.zeros(16, 1), check_grid([[1, 4, 4]], 2), (1,), True)
    assert len(computed) == 4
    assert len(graphs._reading_orders) == 3
    for layers in ((0,), (0, 1), (1,)):
        states(graphs, layers, 4)
    assert len(graphs._sharing) == 2


def test_grids_that_the_caller_overwrites_are_kept(no_cuda, monkeypatch):
    """Tables are made when they are first needed, which may be after the caller has reused the tensor."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda table: table)
    tower = cpu_tower()
    graphs, grid = GraphedTower(tower), torch.tensor([[1, 4, 8]])
    prepared = graphs._prepare(check_grid(grid, 2))
    grid[0, 1] = 16
    assert graphs._prepare(check_grid([[1, 4, 8]], 2)) is prepared
    assert graphs._table(prepared, 1)[0, 3:].tolist() == [4, 8]
