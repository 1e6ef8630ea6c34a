"""The fast tower in CUDA graphs: one for each capacity, which any grids that fit may use.

A graph holds everything from the table of grids and the pixel values, copied into buffers of its own, to the output:
no two layouts can be confused, for the layout is computed inside. Capacities grow in steps of a sixteenth, so at most
6 % of the work is on room to spare. Results are copied out; later calls leave them alone.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwenvit import device_plan
from qwenvit.device_plan import Capacity
from qwenvit.fast import FastTower, refuse_gradients
from qwenvit.outputs import TowerOutput

MOST_GRAPHS = 160
"""Graphs kept; the one not used for longest makes room. Each holds buffers for its inputs and shares the rest."""
MOST_PATCHES = 32768
"""Larger batches run without a graph: launches are a small part of their time, and buffers would be large."""
LEAST_SIDE = 512
"""Rows and columns of patches that every graph has angles for; larger frames double it."""


def capacity_for(need: Capacity, merge_unit: int) -> Capacity:
    """The graph's capacity for what some grids need.

    Patches are rounded up to a multiple of a sixteenth of the power of two below (at least 64), other counts to powers
    of two that begin at what images of ordinary shapes need, so that they seldom make a difference.
    """
    step = max(64, 2 ** ((need.patches - 1).bit_length() - 5))
    patches = -(-need.patches // step) * step
    least = max(8, patches // 1024)
    windows = _power(max(need.windows, patches // 32)) if need.windows else 0
    frames, items = (_power(max(count, least)) for count in (need.frames, need.items))
    return Capacity(-(-patches // merge_unit) * merge_unit, frames, windows, items, _power(max(need.side, LEAST_SIDE)))


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _addresses(tower: FastTower) -> list[int]:
    return [parameter.data_ptr() for parameter in (tower.patch_embed.weight, tower.merger.fc2.weight)]


class Graph:
    """One captured forward pass, its buffers, and the event after its last use."""

    def __init__(self, tower: FastTower, room: Capacity, angles: tuple[Tensor, Tensor], pool: Any) -> None:
        weight = tower.patch_embed.weight
        self.merge_unit = tower.config.merge_unit
        self.table = device_plan.tabulate(torch.tensor([[1, 2, 2]]), tower.config, room.items).to(weight.device)
        self.pixel_values = weight.new_zeros((room.patches, tower.config.patch_dim))

        def run() -> TowerOutput:
            plan = device_plan.compute(self.table, angles, tower.config, room, tower.impl)
            return tower(self.pixel_values, plan)

        stream = torch.cuda.Stream(weight.device)
        stream.wait_stream(torch.cuda.current_stream(weight.device))
        with torch.cuda.stream(stream):
            run()  # compiles kernels and sets libraries up, which a capture may not
        torch.cuda.current_stream(weight.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = run()

    def replay(self, table: Tensor, pixel_values: Tensor) -> TowerOutput:
        """Run on the current stream; the result is a copy."""
        patches = len(pixel_values)
        tokens = patches // self.merge_unit
        self.table.copy_(table, non_blocking=True)
        self.pixel_values[:patches].copy_(pixel_values, non_blocking=True)
        self.graph.replay()
        return TowerOutput(
            self.output.last_hidden_state[:patches].clone(),
            self.output.pooler_output[:tokens].clone(),
            [layer[:tokens].clone() for layer in self.output.deepstack_features],
        )


class GraphedTower:
    """A fast tower on a GPU that captures a graph for each capacity it meets, and replays it from then on.

    Any thread and any stream may call it: calls take turns, on the host by a lock and on the GPU by an event.

    Args:
        tower: on a CUDA device.
    """

    def __init__(self, tower: FastTower) -> None:
        self.tower = tower
        self._lock = threading.Lock()
        self._forget()

    def __reduce__(self) -> tuple[type["GraphedTower"], tuple[FastTower]]:
        """Copies and pickles begin without graphs."""
        return GraphedTower, (self.tower,)

    def _forget(self) -> None:
        self.device = self.tower.patch_embed.weight.device
        self._weights = _addresses(self.tower)
        self._graphs: OrderedDict[Capacity, Graph] = OrderedDict()
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.cuda.device(self.device):
            self._pool = torch.cuda.graph_pool_handle()
            self._idle = torch.cuda.Event()

    def __call__(self, pixel_values: Tensor, grid: Tensor) -> TowerOutput:
        """Encode packed patches.

        Args:
            pixel_values: `[patches, C·T·P·P]` in any floating dtype, on any device.
            grid: `[items, 3]` int64 on the CPU, checked.

        Raises:
            ValueError: gradients are asked for.
        """
        refuse_gradients(pixel_values)
        config = self.tower.config
        need = device_plan.measure(grid, config)
        if need.patches > MOST_PATCHES or torch.cuda.is_current_stream_capturing():
            return self._without_graph(pixel_values, grid, need)
        room = capacity_for(need, config.merge_unit)
        with self._turn() as stream:
            graph = self._graph(room)
            output = graph.replay(device_plan.tabulate(grid, config, room.items).pin_memory(), pixel_values)
            self._idle.record(stream)
        return output

    @torch.no_grad()
    def _without_graph(self, pixel_values: Tensor, grid: Tensor, need: Capacity) -> TowerOutput:
        config, device = self.tower.config, self.tower.patch_embed.weight.device
        table = device_plan.tabulate(grid, config, need.items).to(device)
        angles = device_plan.angle_tables(config, need.side, device)
        plan = device_plan.compute(table, angles, config, need, self.tower.impl)
        return self.tower(pixel_values.to(device), plan)

    @contextmanager
    def _turn(self) -> Iterator[torch.cuda.Stream]:
        """Alone with the graphs, on the host and on the GPU."""
        with self._lock:
            if _addresses(self.tower) != self._weights:  # moved or converted since: graphs hold the old addresses
                torch.cuda.synchronize(self.device)
                self._forget()
            with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
                stream = torch.cuda.current_stream()
                stream.wait_event(self._idle)
                yield stream

    def warm_up(self, patches: int) -> int:
        """Capture the graphs of every capacity up to so many patches in one image; returns their number.

        Raises:
            ValueError: more patches than graphs are made for.
        """
        unit = self.tower.config.merge_unit
        if patches > MOST_PATCHES:
            expected = f"at most {MOST_PATCHES // unit}, beyond which no graph is used"
            raise ValueError(f"max_tokens: expected {expected}, got {patches // unit}")
        rooms, reached = [], unit
        while reached < patches + unit:
            room = capacity_for(self._square(reached), unit)
            rooms.append(room)
            reached = room.patches + unit
        with self._turn() as stream:
            for room in reversed(rooms):  # the largest first: the others fit into its memory
                self._graph(room)
            self._idle.record(stream)
        return len(rooms)

    def _square(self, patches: int) -> Capacity:
        config = self.tower.config
        windows = 0 if config.window_size is None else 1
        return Capacity(patches, 1, windows, 1, 1)

    def _graph(self, room: Capacity) -> Graph:
        if room not in self._graphs:
            if len(self._graphs) >= MOST_GRAPHS:
                torch.cuda.synchronize()  # the graph that goes may still be running
                self._graphs.popitem(last=False)
            if room.side not in self._angles:
                self._angles[room.side] = device_plan.angle_tables(self.tower.config, room.side, self.device)
            self._graphs[room] = Graph(self.tower, room, self._angles[room.side], self._pool)
        self._graphs.move_to_end(room)
        return self._graphs[room]
