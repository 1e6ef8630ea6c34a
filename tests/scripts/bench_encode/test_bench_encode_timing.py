"""How `scripts/bench_encode.py` measures: work on the GPU, and contenders that take turns. Nothing here is timed."""

from types import SimpleNamespace

import pytest
import torch

from common import timing
from common.timing import gpu_seconds
from encode_bench import measure
from support.cuda_events import events_at


def test_work_on_the_gpu_is_timed_behind_other_work(monkeypatch):
    now, order = [0.0], []

    def call():
        order.append("call")
        now[0] += len(order)

    cuda = SimpleNamespace(
        is_available=lambda: True,
        Event=events_at(now, recorded=lambda: order.append("event")),
        synchronize=lambda: order.append("wait"),
        _sleep=lambda _: order.append("busy"),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert gpu_seconds(call, repeats=3) == pytest.approx(9e-3)  # 4, 9 and 14 ms
    assert order == ["wait", "busy", "event", "call", "event"] * 3 + ["wait"]


def test_contenders_take_turns(monkeypatch):
    order, now = [], [0.0]

    def contender(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds[order.count(name) - 1]

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = {"a": contender("a", [1, 5, 2]), "b": contender("b", [1, 1, 1])}
    assert measure.median_seconds(calls, rounds=3, max_seconds=100) == {"a": 2, "b": 1}
    assert order == ["a", "b", "b", "a", "a", "b"]
    order.clear()
    measure.median_seconds(calls, rounds=3, max_seconds=5)
    assert order == ["a", "b", "b", "a"]  # 2 s after the first round, 8 s after the second
