"""How `scripts/bench_e2e.py` measures: rounds, memory, replays, capacities, cold processes. Nothing here is timed."""

import gc
import itertools
import json
import operator
import subprocess
import weakref
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from common import timing
from common.hf_towers import build_tower, save_tower
from e2e import cold as e2e_cold
from e2e import graphs as e2e_graphs
from e2e import timing as e2e_timing
from peers import cuda_graph
from qwenvit.graphs import graphed_tower
from qwenvit.graphs.capacity import Capacity
from qwenvit.towers.fast import FastTower
from support.cuda_events import events_at
from support.towers import narrow


def test_a_graph_keeps_the_inputs_of_its_call_alive(monkeypatch):
    monkeypatch.setattr(torch, "cuda", mock.MagicMock())

    def call_and_its_input():
        x = torch.ones(3)
        return (lambda: [2 * x]), weakref.ref(x)

    call, x = call_and_its_input()
    replay = cuda_graph.capture(call)
    del call
    gc.collect()
    assert x() is not None  # else the graph would read freed memory
    first, second = replay(), replay()
    assert torch.equal(first[0], torch.full((3,), 2.0))
    assert first[0].data_ptr() != second[0].data_ptr()
    del replay
    gc.collect()
    assert x() is None


def test_interleaved_rounds(monkeypatch):
    order = []
    monkeypatch.setattr(e2e_timing, "wall_seconds", lambda call: call())

    def contender(name, seconds):
        return lambda: order.append(name) or seconds

    calls = {name: contender(name, s) for name, s in (("ours", 0.5), ("fast", 0.001), ("slow", 0.1), ("slowest", 9))}
    spent = e2e_timing.time_interleaved(calls, 16, 0.8, 5, every_round={"ours"})
    assert {name: len(times) for name, times in spent.items()} == {"ours": 16, "fast": 16, "slow": 8, "slowest": 6}
    assert order[:4] == list(calls)  # the untimed round
    rounds = "".join({"ours": "o", "fast": "f", "slow": "s", "slowest": "S"}[name] for name in order[4:])
    whole = itertools.cycle(["ofSs", "fsoS", "sSfo", "Sosf"])  # of contenders that skip no round
    present = ["ofsS", "of", "ofs", "ofS", "ofs", "of"] * 2 + ["ofsS", "of", "ofs", "ofS"]
    assert rounds == "".join(name for names in present for name in next(whole) if name in names)


@pytest.mark.parametrize("count", range(2, 10))
def test_each_contender_follows_every_other_equally_often(count):
    names = list("abcdefghi"[:count])
    cycle = 2 * count if count % 2 else count
    orders = list(timing.balanced_orders(names, cycle))
    assert all(sorted(order) == names for order in orders)
    followers = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert followers == dict.fromkeys(itertools.permutations(names, 2), cycle // count)
    assert Counter(order[0] for order in orders) == dict.fromkeys(names, cycle // count)
    assert list(timing.balanced_orders(names, 2 * cycle)) == 2 * orders
    assert list(timing.balanced_orders("a", 3)) == 3 * [["a"]]


def test_calls_in_a_row(monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(e2e_timing, "wall_seconds", lambda call: call())
    assert e2e_timing.time_in_a_row(lambda: next(calls)) == list(range(40, 70))


def test_peak_memory_counts_what_a_call_keeps_and_adds(monkeypatch):
    state = {"in use": 100, "pools": 77, "peak": 0}  # pools of deleted graphs

    def call():
        state["peak"] = max(state["peak"], state["in use"] + 5)  # results
        return []

    def prepare():
        state["in use"] += 20  # buffers
        state["pools"] = 300  # a capture frees the pools of deleted graphs
        state["peak"] = 10**6
        return call

    monkeypatch.setattr(e2e_timing, "free_cached_memory", lambda: state.update(pools=0))
    monkeypatch.setattr(e2e_timing, "allocated_bytes", lambda: state["in use"] + state["pools"])
    cuda = SimpleNamespace(
        synchronize=lambda: None,
        memory_allocated=lambda: state["in use"],
        reset_peak_memory_stats=lambda: state.update(peak=state["in use"]),
        max_memory_allocated=lambda: state["peak"],
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert e2e_timing.peak_memory(prepare) == (325, [])


def test_replays_are_timed_alone(monkeypatch):
    now = [0.0]

    class Graph:
        def replay(self):
            now[0] += 3.0

    def call():
        now[0] += 100
        graph.replay()
        now[0] += 100

    graph, original = Graph(), Graph.replay
    cuda = SimpleNamespace(CUDAGraph=Graph, Event=events_at(now), synchronize=lambda: None, _sleep=lambda _: None)
    monkeypatch.setattr(torch, "cuda", cuda)
    assert e2e_timing.replay_time(call) == pytest.approx(3000)
    assert Graph.replay is original


@pytest.mark.parametrize("waits", [False, True])
def test_host_time_is_until_the_launch_and_the_return(monkeypatch, waits):
    now, done, caches_are_warm, replays = [0.0], [False], [True], [True]

    class Event:
        def record(self):
            pass

        def query(self):
            return done[0]

    class Graph:
        def replay(self):
            now[0] += 0.5

    def call():
        now[0] += 0.25 if caches_are_warm[0] else 1.0
        caches_are_warm[0] = True
        if replays[0]:
            Graph().replay()
        done[0] = waits

    def add(data, one, out):
        assert (len(data), one) == (e2e_timing.CACHE_BYTES, 1)
        assert out is data
        caches_are_warm[0] = False

    original = Graph.replay
    cuda = SimpleNamespace(CUDAGraph=Graph, Event=Event, synchronize=lambda: None, _sleep=lambda _: None)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(e2e_timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(e2e_timing.np, "add", add)
    found = e2e_timing.host_time(call)
    assert found == {"us": 0.75e6, "launch": 0.25e6, "cold_launch": 1e6, "waited": e2e_timing.REPEATS if waits else 0}
    replays[0] = False
    with pytest.raises(RuntimeError, match="replays no CUDA graph"):
        e2e_timing.host_time(call)
    assert Graph.replay is original


def test_call_with_capacity_replaces_the_capacity_alone(monkeypatch):
    class Graph:
        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    rounded, used = graphed_tower.capacity_for, []
    need = Capacity(100, 1, 0, 1, 12)

    def encoder(pixels, grid):
        used.append(graphed_tower.capacity_for(need, 4))
        if pixels is None:
            raise ValueError("no pixels")
        if used[-1] is not None:  # None means no graph, as in the tower in graphs
            Graph().replay()

    assert rounded(need, 4) != need
    for capacity_for, capacity in ((e2e_graphs.exact_capacity, need), (rounded, rounded(need, 4))):
        call = e2e_graphs.call_with_capacity(capacity_for, encoder, "pixels", "grid")
        assert used[-1] == capacity
        assert (call.func, call.args) == (encoder, ("pixels", "grid"))
        assert graphed_tower.capacity_for is rounded
    with pytest.raises(ValueError, match="no pixels"):
        e2e_graphs.call_with_capacity(e2e_graphs.exact_capacity, encoder, None, "grid")
    assert graphed_tower.capacity_for is rounded
    never_asks = lambda *_: Graph().replay()  # noqa: E731
    for capacity_for, wrong in ((e2e_graphs.exact_capacity, never_asks), (lambda *_: None, encoder)):
        with pytest.raises(RuntimeError, match="replayed no graph"):
            e2e_graphs.call_with_capacity(capacity_for, wrong, "pixels", "grid")


def test_a_fresh_encoder_has_the_same_weights_and_no_graphs():
    tower = FastTower(narrow("qwen2_vl", depth=1, intermediate_size=320, out_hidden_size=8), "reference")
    tower.graphs = "graphs"
    encoder = e2e_graphs.fresh_encoder(tower)
    assert encoder.tower.graphs is None
    assert tower.graphs == "graphs"
    assert all(map(operator.is_, encoder.tower.parameters(), tower.parameters()))


def test_the_tower_in_graphs_looks_up_the_capacity_where_it_is_replaced():
    """`call_with_capacity` patches `graphed_tower.capacity_for`, so the tower has to look the name up there."""
    assert "capacity_for" in graphed_tower.GraphedTower._prepare.__code__.co_names


def test_a_cold_process(tmp_path, monkeypatch):
    config = narrow("qwen3_vl", depth=1, deepstack_visual_indexes=())
    source = save_tower(build_tower(config), config, tmp_path)
    found = e2e_cold.cold_start(source, "cpu", "reference")
    assert found["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert found["kernels"] == 0
    assert all(found[step] > 0 for step in ("imports", "read", "load", "first", "second"))
    with pytest.raises(RuntimeError, match="ended with 2"):
        e2e_cold.cold_start(source, "cpu", "other")
    environment = {}

    def run(command, env, **_):
        environment.update(env)
        return SimpleNamespace(returncode=0, stdout=json.dumps({"load": 1}))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match="compiled no kernel"):
        e2e_cold.cold_start(source)
    assert len({environment[name] for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")}) == 3
