"""Measure what CUDA graphs cost: time and memory of captures, host time of a call, and rounding up to a capacity."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from common.encoders import fresh_encoder
from common.timing import Call, wall_seconds
from common.tower_inputs import Case, pixel_values
from e2e.cases import all_cases
from e2e.timing import allocated_bytes, driver_bytes, free_cached_memory, host_time
from qwenvit import Encoder
from qwenvit.graphs import graphed_tower
from qwenvit.graphs.capacity import Capacity
from qwenvit.towers.fast import FastTower

SMALL, LARGE = "448²", "1344²"
REPLAYS = 5
"""Calls after a capture. Their median is subtracted from the time of the first call."""


def call_with_capacity(
    capacity_for: Callable[[Capacity, int], Capacity], encoder: Encoder, pixels: Tensor, grid: Tensor
) -> Call:
    """Return a call of an encoder whose graph for this grid has the capacity that a function returns.

    The encoder runs once with `capacity_for` in place of `graphed_tower.capacity_for`, and keeps that graph.

    Raises:
        RuntimeError: the encoder did not call the function, or did not replay a graph.
    """
    replay = torch.cuda.CUDAGraph.replay
    with (
        mock.patch.object(graphed_tower, "capacity_for", side_effect=capacity_for) as asked,
        mock.patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=replay) as replays,
    ):
        encoder(pixels, grid)
    if not (asked.called and replays.called):
        raise RuntimeError("the encoder did not call graphed_tower.capacity_for, or replayed no graph of its capacity")
    return partial(encoder, pixels, grid)


def exact_capacity(need: Capacity, _: int) -> Capacity:
    """Return the capacity that a batch needs, without rounding it up."""
    return need


def graph_costs(tower: FastTower, dtype: torch.dtype) -> dict[str, Any]:
    """Measure captures at two sizes, the larger first, the host time of a call, and a warmup for all smaller images.

    No CUDA graph may be alive before.

    Returns:
        `capture`: ms of each capture; `memory`: bytes that each added; `host`: see `host_time`; `graphs`, `seconds`,
        `held` and `driver`: number of graphs of a warmup, its seconds, its bytes, and the driver's bytes.
    """
    config, device = tower.config, tower.patch_embed.weight.device
    cases = {case.name: case for case in all_cases(config)}

    def call_of(encoder: Encoder, case: Case) -> Call:
        return partial(encoder, pixel_values(case, config, device, dtype), case.grid_thw())

    call_of(fresh_encoder(tower), cases[LARGE])()  # compiles
    call_of(fresh_encoder(tower), cases[SMALL])()
    free_cached_memory()
    encoder, found = fresh_encoder(tower), dict[str, Any](capture={}, memory={})
    for name in (LARGE, SMALL):
        call, before = call_of(encoder, cases[name]), allocated_bytes()
        first = wall_seconds(call)
        later = statistics.median(wall_seconds(call) for _ in range(REPLAYS))
        found["capture"][name] = (first - later) * 1e3
        found["memory"][name] = allocated_bytes() - before
        del call
    found["host"] = host_time(call_of(encoder, cases[SMALL]))
    del encoder
    free_cached_memory()
    encoder, before, driver_before = fresh_encoder(tower), allocated_bytes(), driver_bytes()
    start = time.perf_counter()
    found["graphs"] = encoder.warmup(cases[LARGE].patches // config.merge_unit)
    torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - start
    return found | {"held": allocated_bytes() - before, "driver": driver_bytes() - driver_before}
