"""The fast tower in CUDA graphs: one for each capacity, which any grids that fit may use.

A graph holds everything from the table of grids and the pixel values, copied into buffers, to the output: no two
layouts can be confused, for the layout is computed inside. Capacities grow in steps of a thirty-second, so at most 3 %
of the patches are room to spare; windows and frames are rounded up further, and empty ones cost next to nothing.
Results are copied out, so later calls leave them alone, and all graphs may use the same memory by turns.
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

from qwenvit import device_plan
from qwenvit.capture import Graph, PixelBuffer
from qwenvit.device_plan import Capacity
from qwenvit.fast import FastTower, refuse_gradients
from qwenvit.outputs import TowerOutput
from qwenvit.watch import Watch

MOST_GRAPHS = 512
"""Graphs kept; the one not used for longest makes room. They share buffers and memory, so each costs little."""
MOST_PATCHES = 32768
"""Larger batches run without a graph: launches are a small part of their time, and buffers would be large."""
MOST_GRIDS = 1024
"""Tables of grids that are kept."""
LEAST_SIDE = 512
"""Rows and columns of patches that every graph has angles for; larger frames double it."""
CAPTURING = threading.Lock()
"""torch allows one capture at a time in a process, whoever's it is."""


def capacity_for(need: Capacity, merge_unit: int) -> Capacity:
    """The graph's capacity for what some grids need.

    Patches are rounded up to a multiple of a thirty-second of the power of two below (at least 16), other counts to
    powers of two that begin at what images of ordinary shapes need, so that they seldom make a difference. One frame
    stays one: attention divides a single segment best where it knows that it is one.

    Room costs more than its share, since cuBLAS chooses anew for every height: of Qwen3-VL-8B's MLP the two products
    take 14.1 and 19.0 µs at 784 patches, and 17.9 and 22.5 at 832, a sixteenth more (H200, bf16).
    """
    step = max(16, 2 ** ((need.patches - 1).bit_length() - 6))
    patches = -(-need.patches // step) * step
    least = max(8, patches // 1024)
    usual = patches // 64 + patches // 256 + 16
    windows = (usual if need.windows <= usual else _power(need.windows)) if need.windows else 0
    frames = 1 if need.frames == 1 else _power(max(need.frames, least))
    items = 1 if need.items == 1 else _power(max(need.items, least))
    return Capacity(-(-patches // merge_unit) * merge_unit, frames, windows, items, _power(max(need.side, LEAST_SIDE)))


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


class GraphedTower:
    """A fast tower on a GPU that captures a graph for each capacity it meets, and replays it from then on.

    Any thread and any stream may call it: calls take turns, on the host by a lock and on the GPU by an event. Weights
    may be loaded or replaced between calls; hooks on blocks run at capture alone. It lives as long as its tower holds
    it (`FastTower.graphs`), and does not keep the tower alive.

    Args:
        tower: on a CUDA device.
    """

    def __init__(self, tower: FastTower) -> None:
        self._tower = weakref.ref(tower)
        self._lock = threading.Lock()
        self._grids: OrderedDict[bytes, tuple[Capacity, Capacity, Tensor]] = OrderedDict()
        self._begin()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copies and pickles of a tower begin without graphs."""
        return type(None), ()

    @property
    def tower(self) -> FastTower:
        """The tower, which holds this."""
        return cast(FastTower, self._tower())

    def _begin(self) -> None:
        self.device = self.tower.patch_embed.weight.device
        self._weights = Watch(self.tower)
        self._graphs: OrderedDict[tuple[Capacity, str], Graph] = OrderedDict()
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._pixels = PixelBuffer()
        with torch.cuda.device(self.device):
            # Of high priority, since torch hands its few streams round, and those of low priority to everyone.
            self._stream = torch.cuda.Stream(self.device, priority=-1)
            self._pool = torch.cuda.graph_pool_handle()
            self._idle = torch.cuda.Event()

    def __call__(self, pixel_values: Tensor, grid: Tensor) -> TowerOutput:
        """Encode packed patches.

        Args:
            pixel_values: `[patches, C·T·P·P]`, or `[patches, C·P·P]` of still images alone, in any floating dtype, on
                any device.
            grid: `[items, 3]` int64 on the CPU, checked.

        Raises:
            ValueError: gradients are asked for, or the current stream is being captured.
        """
        return _untraced()(self, pixel_values, grid)

    def _encode(self, pixel_values: Tensor, grid: Tensor) -> TowerOutput:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("the encoder captures graphs of its own: capture enc.tower(pixel_values, plan) in yours")
        refuse_gradients([pixel_values])
        with self._lock:
            output = self._run(pixel_values, grid)
            # Looked through while the GPU is at work. What graphs read is kept alive, so that they may run in vain.
            if not self._weights.unchanged():
                torch.cuda.synchronize()
                self._begin()
                output = self._run(pixel_values, grid)
            refuse_gradients(self._weights.parameters)
        return output

    def _run(self, pixel_values: Tensor, grid: Tensor) -> TowerOutput:
        config = self.tower.config
        need, room, table = self._prepare(grid)
        with self._turn():
            if room is not need:
                return self._graph(room).replay(table, pixel_values)
            with _plain():
                angles = self._angles_for(_power(need.side))
                table = table.to(self.device, non_blocking=True)
                plan = device_plan.compute(table, angles, config, need, self.tower.impl)
                return self.tower(pixel_values.to(self.device), plan)

    def _prepare(self, grid: Tensor) -> tuple[Capacity, Capacity, Tensor]:
        """What grids need, the room they get, and their table in memory that a GPU reads by itself."""
        key = grid.numpy().tobytes()
        if key not in self._grids:
            config = self.tower.config
            need = device_plan.measure(grid, config)
            room = capacity_for(need, config.merge_unit) if need.patches <= MOST_PATCHES else need
            self._grids[key] = need, room, device_plan.tabulate(grid, config, room.items).pin_memory()
            if len(self._grids) > MOST_GRIDS:
                self._grids.popitem(last=False)
        return self._grids[key]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """On the GPU, after the calls before, whatever streams they ran on."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
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
        windows = 0 if self.tower.config.window_size is None else 1
        rooms, reached = [], unit
        while reached < patches + unit:
            rooms.append(capacity_for(Capacity(reached, 1, windows, 1, 1), unit))
            reached = rooms[-1].patches + unit
        with self._lock:
            if not self._weights.unchanged():
                torch.cuda.synchronize()
                self._begin()
            with self._turn():
                for room in tqdm(rooms[::-1], unit="graph", disable=None):  # the others fit into the largest's memory
                    self._graph(room)
        return len(rooms)

    def _angles_for(self, side: int) -> tuple[Tensor, Tensor]:
        if side not in self._angles:
            self._angles[side] = device_plan.angle_tables(self.tower.config, side, self.device)
        return self._angles[side]

    def _graph(self, room: Capacity) -> Graph:
        key = room, torch.get_float32_matmul_precision()  # a capture keeps what it finds
        if key not in self._graphs:
            try:
                with CAPTURING, _plain():
                    angles = self._angles_for(room.side)
                    if len(self._graphs) >= MOST_GRAPHS:
                        torch.cuda.synchronize()  # the graph that goes may still be running
                        self._graphs.popitem(last=False)
                    self._graphs[key] = Graph(self.tower, room, angles, self._pixels, self._stream, self._pool)
            except BaseException:
                self._pool = torch.cuda.graph_pool_handle()  # the old one may refuse captures from now on
                raise
        self._graphs.move_to_end(key)
        return self._graphs[key]


@cache
def _untraced() -> Callable[[GraphedTower, Tensor, Tensor], TowerOutput]:
    """`_encode`, which torch.compile leaves alone; no decorator of it, which would import Dynamo with the package."""
    return torch.compiler.disable(GraphedTower._encode)


@contextmanager
def _plain() -> Iterator[None]:
    """Whatever modes a caller is in, what is computed or captured is the same."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield


def graphs_of(tower: nn.Module) -> GraphedTower | None:
    """The tower's graphs, if it is one that runs in them."""
    if not isinstance(tower, FastTower) or tower.impl == "reference" or not tower.patch_embed.weight.is_cuda:
        return None
    if tower.graphs is None:
        with CAPTURING:
            tower.graphs = tower.graphs or GraphedTower(tower)
    return tower.graphs
