"""The fast tower in CUDA graphs: one for each capacity, which any grids that fit may use.

A graph holds everything from the table of grids and the pixel values, copied to where it reads them, to the output: no
two layouts can be confused, for the layout is computed inside. Capacities grow in steps of a thirty-second, or of 16
patches; windows and frames are rounded up further, and empty ones cost next to nothing. Results are copied out, so all
graphs may use the same memory by turns.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from qwenvit.graphs import device_plan
from qwenvit.graphs.capacity import (
    MOST_PATCHES,
    Capacity,
    Grids,
    capacity_for,
    pool_patches_for,
    power,
    single_image_capacity,
)
from qwenvit.graphs.graph import Graph
from qwenvit.graphs.weight_guard import WeightGuard
from qwenvit.outputs import TowerOutput
from qwenvit.towers.fast import FastTower, refuse_gradients

MOST_GRAPHS = 512
"""Graphs kept; the one not used for longest makes room. They share memory (`_allocate_pool`), so each costs little."""
MOST_GRIDS = 1024
"""Tables of grids that are kept."""
CAPTURING = threading.Lock()
"""torch allows one capture at a time in a process, whoever's it is."""


class GraphedTower:
    """A fast tower on a GPU that captures a graph for each capacity it meets, and replays it from then on.

    Any thread and any stream may call it: calls take turns, on the host by a lock and on the GPU by an event. Weights
    may be loaded or replaced between calls. It lives as long as its tower holds it, and does not keep the tower alive.

    Args:
        tower: on a CUDA device.
    """

    def __init__(self, tower: FastTower) -> None:
        self._tower = weakref.ref(tower)
        self._lock = threading.Lock()
        self._grids = OrderedDict[bytes, Grids]()
        self._begin()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copies and pickles of a tower begin without graphs."""
        return type(None), ()

    @property
    def tower(self) -> FastTower:
        """The tower, which holds this; None once it is gone."""
        return cast(FastTower, self._tower())

    def _begin(self) -> None:
        weight = self.tower.patch_embed.weight
        self.device, self._is_fp32 = weight.device, weight.dtype == torch.float32
        self._weights = WeightGuard(self.tower)
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._graphs: OrderedDict[tuple[Capacity, object], Graph] = OrderedDict()
        self._reach = 0
        with torch.cuda.device(self.device):
            # Of high priority, since torch hands its few streams round, and those of low priority to everyone.
            self._stream, self._idle = torch.cuda.Stream(self.device, priority=-1), torch.cuda.Event()

    def __call__(self, pixel_values: Tensor, grid: Tensor) -> TowerOutput:
        """Encode packed patches.

        Args:
            pixel_values: `[patches, C·T·P·P]`, or `[patches, C·P·P]` of still images alone, in any floating dtype, on
                any device.
            grid: `[items, 3]` int64 on the CPU, checked.

        Raises:
            ValueError: gradients are asked for, the tower has hooks, or the current stream is being captured.
        """
        if torch.compiler.is_compiling():
            return _untraced()(self, pixel_values, grid)
        return self._encode(pixel_values, grid)

    def _encode(self, pixel_values: Tensor, grid: Tensor) -> TowerOutput:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("the encoder captures graphs of its own: capture enc.tower(pixel_values, plan) in yours")
        refuse_gradients([pixel_values])
        with self._lock:
            prepared = self._prepare(grid)
            captured = self._key(prepared.room) in self._graphs
            if not captured:
                self._renew()
            output = self._run(pixel_values, prepared)
            # Looked for while the GPU is at work: all that graphs read is kept alive, so that they may run in vain.
            if captured and self._renew():
                output = self._run(pixel_values, prepared)
            refuse_gradients(self._weights.parameters)
        return output

    def release_memory(self) -> None:
        """Keep no memory of weights, which are about to be moved."""
        with self._lock, CAPTURING:  # as nobody may wait for a GPU during a capture
            torch.cuda.synchronize(self.device)  # graphs may be reading it
            self._weights.release()

    def retain_memory(self) -> bool:
        """Keep it again, if they were not moved after all; whether that is so."""
        with self._lock:
            self._weights.hold()
            return self._weights.unchanged()

    def _renew(self) -> bool:
        """Begin anew if weights lie elsewhere than graphs think; whether that was so. Hooks are refused."""
        if changed := not self._weights.unchanged():
            with CAPTURING:
                torch.cuda.synchronize(self.device)
            self._begin()
        self._weights.refuse_hooks()
        return changed

    def _run(self, pixel_values: Tensor, grids: Grids) -> TowerOutput:
        with self._turn():
            if grids.room is not grids.need:
                return self._graph(grids.room).replay(grids.table, pixel_values)
            with _plain(self.device):
                angles = self._angles_for(power(grids.need.side))
                table = grids.table.to(self.device, non_blocking=True)
                plan = device_plan.compute_plan(table, angles, self.tower.config, grids.need, self.tower.impl)
                return self.tower(pixel_values.to(self.device), plan)

    def _prepare(self, grid: Tensor) -> Grids:
        key = grid.numpy().tobytes()
        if key not in self._grids:
            config = self.tower.config
            need = device_plan.measure_grids(grid, config)
            room = capacity_for(need, config.merge_unit) if need.patches <= MOST_PATCHES else need
            self._grids[key] = Grids(need, room, device_plan.grid_table(grid, config, room.items).pin_memory())
            if len(self._grids) > MOST_GRIDS:
                self._grids.popitem(last=False)
        return self._grids[key]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """On the GPU, after the calls before, whatever streams they ran on."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._idle)
        try:
            yield
        finally:  # whatever was launched before a failure runs on
            self._idle.record(stream)

    def warm_up(self, patches: int) -> int:
        """Capture the graphs of one image of every size up to so many patches; returns their number.

        Raises:
            ValueError: more patches than graphs are made for.
        """
        unit = self.tower.config.merge_unit
        if patches > MOST_PATCHES:
            expected = f"at most {MOST_PATCHES // unit}, beyond which no graph is used"
            raise ValueError(f"max_tokens: expected {expected}, got {patches // unit}")
        rooms, reached = [], unit
        while reached < patches + unit:
            rooms.append(single_image_capacity(reached, self.tower.config))
            reached = rooms[-1].patches + unit
        with self._lock:
            self._renew()
            with self._turn():
                for room in tqdm(rooms[::-1], unit="graph", disable=None):
                    self._graph(room)
        return len(rooms)

    def _angles_for(self, side: int) -> tuple[Tensor, Tensor]:
        if side not in self._angles:
            self._angles[side] = device_plan.angle_tables(self.tower.config, side, self.device)
        return self._angles[side]

    def _key(self, room: Capacity) -> tuple[Capacity, object]:
        if not self._is_fp32:
            return room, None
        matmul = torch.backends.cuda.matmul  # a capture keeps the way of multiplying fp32 that it finds
        return room, getattr(matmul, "fp32_precision", None) or matmul.allow_tf32

    def _graph(self, room: Capacity) -> Graph:
        key = self._key(room)
        if key not in self._graphs:
            try:
                with CAPTURING, _plain(self.device):
                    if room.patches > self._reach:
                        self._allocate_pool(room.patches)
                    if key not in self._graphs:
                        self._capture(room)
            except BaseException:
                self._reach = 0  # the pool may refuse captures from now on, so the next one gets another
                raise
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _allocate_pool(self, patches: int) -> None:
        """Begin with a graph of so many patches or some more, whose memory is enough for all smaller ones.

        In rising order each would add memory: what a smaller one left is no place for its largest tensors. Smaller ones
        are captured again for it.
        """
        torch.cuda.synchronize(self.device)  # the graphs that go may still be running
        self._graphs.clear()
        self._reach = pool_patches_for(patches)
        room = single_image_capacity(self._reach, self.tower.config)
        self._pool = torch.cuda.graph_pool_handle()
        self._capture(room)

    def _capture(self, room: Capacity) -> None:
        if len(self._graphs) >= MOST_GRAPHS:
            torch.cuda.synchronize(self.device)
            self._graphs.popitem(last=False)
        angles = self._angles_for(room.side)
        self._graphs[self._key(room)] = Graph(self.tower, room, angles, self._stream, self._pool)


@cache
def _untraced() -> Callable[[GraphedTower, Tensor, Tensor], TowerOutput]:
    """`_encode`, which torch.compile leaves alone; no decorator of it, which would import Dynamo with the package."""
    return torch.compiler.disable(GraphedTower._encode)


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Whatever modes a caller is in, what is computed or captured is the same."""
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield


def graphs_of(tower: nn.Module) -> GraphedTower | None:
    """The tower's graphs, if it is one that runs in them."""
    if not isinstance(tower, FastTower) or tower.impl == "reference" or not tower.patch_embed.weight.is_cuda:
        return None
    if not _holds(tower):
        with CAPTURING:
            if not _holds(tower):
                tower.graphs = GraphedTower(tower)
    return cast(GraphedTower, tower.graphs)


def _holds(tower: FastTower) -> bool:
    """Whether it has graphs, and they are its own: a shallow copy of a tower brings those of the original."""
    return tower.graphs is not None and tower.graphs.tower is tower
