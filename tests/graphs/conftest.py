"""Stubs in place of CUDA for the tests of graphs that need no GPU."""

import contextlib
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from qwenvit.graphs import device_plan, graphed_tower
from qwenvit.graphs.capacity import Capacity, capacity_for
from qwenvit.graphs.graph import Graph, UnownedTensor


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
