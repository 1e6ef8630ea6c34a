"""How `scripts/bench_e2e.py` measures: turns, memory, replays, capacities, cold processes. Nothing here is timed."""

import gc
import json
import operator
import subprocess
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from common.hf_towers import build_tower, save_tower
from e2e import cold as e2e_cold
from e2e import graphs as e2e_graphs
from e2e import timing as e2e_timing
from peers import towers as peer_towers
from qwenvit.graphs import graphed_tower as graphs
from qwenvit.graphs.capacity import Capacity
from qwenvit.towers.fast import FastTower
from support.towers import FULL, SMALL


def test_a_graph_keeps_what_its_call_reads(monkeypatch):
    monkeypatch.setattr(torch, "cuda", mock.MagicMock())

    def a_call():
        given = torch.ones(3)
        return (lambda: [2 * given]), weakref.ref(given)

    call, given = a_call()
    replay = peer_towers.captured(call)
    del call
    gc.collect()
    assert given() is not None  # else the graph would read memory that others are given
    first, second = replay(), replay()
    assert torch.equal(first[0], torch.full((3,), 2.0))
    assert first[0].data_ptr() != second[0].data_ptr()
    del replay
    gc.collect()
    assert given() is None


def test_turns(monkeypatch):
    order = []
    monkeypatch.setattr(e2e_timing, "wall", lambda call: call())

    def contender(name, seconds):
        return lambda: order.append(name) or seconds

    calls = {name: contender(name, s) for name, s in (("ours", 0.5), ("fast", 0.001), ("slow", 0.1), ("slowest", 9))}
    spent = e2e_timing.take_turns(calls, 16, 0.8, 5, always={"ours"})
    assert {name: len(times) for name, times in spent.items()} == {"ours": 16, "fast": 16, "slow": 8, "slowest": 6}
    assert order[:4] == list(calls)  # the round that comes before
    rounds = "".join({"ours": " o", "fast": "f", "slow": "s", "slowest": "S"}[name] for name in order[4:]).split()
    assert rounds == ["ofsS", "of", "ofs", "ofS", "ofs", "of"] * 2 + ["ofsS", "of", "ofs", "ofS"]


def test_memory_counts_what_is_kept_and_what_a_call_adds(monkeypatch):
    state = {"in use": 100, "pools": 77, "peak": 0}  # pools of graphs that are gone

    def call():
        state["peak"] = max(state["peak"], state["in use"] + 5)  # results
        return []

    def prepare():
        state["in use"] += 20  # buffers
        state["pools"] = 300  # a capture returns what was left of others
        state["peak"] = 10**6
        return call

    monkeypatch.setattr(e2e_timing, "clean", lambda: state.update(pools=0))
    monkeypatch.setattr(e2e_timing, "held_bytes", lambda: state["in use"] + state["pools"])
    cuda = SimpleNamespace(
        synchronize=lambda: None,
        memory_allocated=lambda: state["in use"],
        reset_peak_memory_stats=lambda: state.update(peak=state["in use"]),
        max_memory_allocated=lambda: state["peak"],
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert e2e_timing.memory_of(prepare) == (325, [])


def test_replays_are_timed_alone(monkeypatch):
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph:
        def replay(self):
            now[0] += 3.0

    def call():
        now[0] += 100
        graph.replay()
        now[0] += 100

    graph, original = Graph(), Graph.replay
    cuda = SimpleNamespace(CUDAGraph=Graph, Event=Event, synchronize=lambda: None, _sleep=lambda _: None)
    monkeypatch.setattr(torch, "cuda", cuda)
    assert e2e_timing.replay_time(call) == pytest.approx(3000)
    assert Graph.replay is original


def test_a_host_that_waits_is_told_from_one_that_does_not(monkeypatch):
    for waits in (False, True):
        done = [False]

        class Event:
            def record(self):
                pass

            def query(self):
                return done[0]  # noqa: B023 (called within this turn)

        cuda = SimpleNamespace(Event=Event, synchronize=lambda: None, _sleep=lambda _: None)
        monkeypatch.setattr(torch, "cuda", cuda)
        found = e2e_timing.host_time(lambda: done.__setitem__(0, waits))  # noqa: B023
        assert found["waited"] == (e2e_timing.REPEATS if waits else 0)
        assert found["us"] > 0


def test_exact_and_rounded_differ_in_capacity_alone(monkeypatch):
    class Graph:
        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    usual, used = graphs.capacity_for, []
    need = Capacity(100, 1, 0, 1, 12)

    def encoder(pixels, grid):
        used.append(graphs.capacity_for(need, 4))
        if pixels is None:
            raise ValueError("no pixels")
        if used[-1] is not need:  # as the tower in graphs tells whether there is a graph
            Graph().replay()

    assert usual(need, 4) != need
    for rounding, room in ((e2e_graphs.exact, need), (usual, usual(need, 4))):
        call = e2e_graphs.rounding_by(rounding, encoder, "pixels", "grid")
        assert used[-1] == room
        assert (call.func, call.args) == (encoder, ("pixels", "grid"))
        assert graphs.capacity_for is usual
    with pytest.raises(ValueError, match="no pixels"):
        e2e_graphs.rounding_by(e2e_graphs.exact, encoder, None, "grid")
    assert graphs.capacity_for is usual
    for rounding, deaf in ((e2e_graphs.exact, lambda *_: Graph().replay()), (lambda need, _: need, encoder)):
        with pytest.raises(RuntimeError, match="replays no graph"):
            e2e_graphs.rounding_by(rounding, deaf, "pixels", "grid")


def test_afresh_means_the_same_weights_without_graphs():
    shape = {"depth": 1, "hidden_size": 160, "num_heads": 2, "intermediate_size": 320, "out_hidden_size": 8}
    tower = FastTower(replace(FULL["qwen2_vl"], **shape), "reference")
    tower.graphs = "graphs"
    encoder = e2e_graphs.afresh(tower)
    assert encoder.tower.graphs is None
    assert tower.graphs == "graphs"
    assert all(map(operator.is_, encoder.tower.parameters(), tower.parameters()))


def test_the_graphs_ask_for_their_capacity_where_it_is_replaced():
    """`rounding_by` replaces a name of `qwenvit.graphs`: the tower in graphs has to look it up there."""
    assert "capacity_for" in graphs.GraphedTower._prepare.__code__.co_names


def test_a_cold_process(tmp_path, monkeypatch):
    config = replace(SMALL["qwen3_vl"], depth=1, deepstack_visual_indexes=())
    source = save_tower(build_tower(config), config, tmp_path)
    found = e2e_cold.cold_start(source, "cpu", "reference")
    assert found["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert found["kernels"] == 0
    assert all(found[part] > 0 for part in ("imports", "read", "load", "first", "second"))
    with pytest.raises(RuntimeError, match="ended with 2"):
        e2e_cold.cold_start(source, "cpu", "other")
    given = {}

    def ran(command, env, **_):
        given.update(env)
        return SimpleNamespace(returncode=0, stdout=json.dumps({"load": 1}))

    monkeypatch.setattr(subprocess, "run", ran)
    with pytest.raises(RuntimeError, match="compiled no kernel"):
        e2e_cold.cold_start(source)
    assert len({given[name] for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")}) == 3
