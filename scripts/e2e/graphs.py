"""What CUDA graphs cost: time and memory of a capture, the host's part of a call, and room to spare."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from e2e.cases import Case, all_cases, pixel_values
from e2e.timing import Call, clean, driver_bytes, held_bytes, host_time, wall
from qwenvit import Encoder
from qwenvit.graphs import graphed_tower as graphs
from qwenvit.graphs.capacity import Capacity
from qwenvit.towers.fast import FastTower

SMALL, LARGE = "448²", "1344²"
LATER = 5
"""Calls after a capture, whose median is taken off the first one's time."""


def afresh(tower: FastTower) -> Encoder:
    """An encoder of the same weights, whose tower has no graphs yet."""
    twin = copy.copy(tower)
    twin.graphs = None
    return Encoder(twin)


def rounding_by(capacity: Callable[[Capacity, int], Capacity], encoder: Encoder, pixels: Tensor, grid: Tensor) -> Call:
    """A call of an encoder that found its graph's capacity by this function when it first met the grid.

    Raises:
        RuntimeError: the function is not asked, or no graph is replayed.
    """
    replay = torch.cuda.CUDAGraph.replay
    with (
        mock.patch.object(graphs, "capacity_for", side_effect=capacity) as asked,
        mock.patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=replay) as replays,
    ):
        encoder(pixels, grid)
    if not (asked.called and replays.called):
        raise RuntimeError("the encoder asks no qwenvit.graphs.capacity_for, or replays no graph of that capacity")
    return partial(encoder, pixels, grid)


def exact(need: Capacity, _: int) -> Capacity:
    """Room for what is needed, and no more; a capacity of its own, since the very same one means no graph."""
    return need._replace()


def graph_costs(tower: FastTower, dtype: torch.dtype) -> dict[str, Any]:
    """Captures of two capacities, the larger one first; the host's part of a call; graphs for all images up to that.

    No CUDA graph may be alive before. Memory is in bytes, times in ms, unless the key says otherwise.
    """
    config, device = tower.config, tower.patch_embed.weight.device
    cases = {case.name: case for case in all_cases(config)}

    def call_of(encoder: Encoder, case: Case) -> Call:
        return partial(encoder, pixel_values(case, config, device, dtype), case.grid_thw())

    call_of(afresh(tower), cases[LARGE])()  # compiles
    call_of(afresh(tower), cases[SMALL])()
    clean()
    encoder, found = afresh(tower), dict[str, Any](capture={}, memory={})
    for name in (LARGE, SMALL):
        call, held = call_of(encoder, cases[name]), held_bytes()
        first = wall(call)
        later = statistics.median(wall(call) for _ in range(LATER))
        found["capture"][name] = (first - later) * 1e3
        found["memory"][name] = held_bytes() - held
        del call
    found["host"] = host_time(call_of(encoder, cases[SMALL]))
    del encoder
    clean()
    server, held, driver = afresh(tower), held_bytes(), driver_bytes()
    start = time.perf_counter()
    found["graphs"] = server.warmup(cases[LARGE].patches // config.merge_unit)
    torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - start
    return found | {"held": held_bytes() - held, "driver": driver_bytes() - driver}
