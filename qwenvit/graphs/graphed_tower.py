"""The fast tower in CUDA graphs: one graph for each capacity, which serves any grids that fit.

A graph contains the whole pass: its inputs are a table of the grids and the pixel values. It computes positions,
windows and segments itself, so batches of equal size and different grids can share a graph. Capacities grow in fine
steps of patches; spare windows and frames cost almost nothing. Outputs are copied out, so all graphs can share one
memory pool.
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
    MAX_GRAPH_PATCHES,
    Capacity,
    PreparedGrids,
    capacity_for,
    next_power_of_two,
    pool_patches_for,
    single_image_capacity,
)
from qwenvit.graphs.graph import Graph
from qwenvit.graphs.sharing import GraphSharing
from qwenvit.graphs.weight_guard import WeightGuard
from qwenvit.outputs import TowerOutput
from qwenvit.plan.inputs import CheckedGrid, WritePixels, check_grid
from qwenvit.towers.fast import FastTower, refuse_gradients

MAX_GRAPHS = 512
"""Beyond this many graphs, the least recently used one is dropped. Graphs share a pool, so each costs little memory."""
MAX_PREPARED_GRIDS = 1024
"""Beyond this many different batches, the oldest prepared grids are dropped."""
CAPTURE_LOCK = threading.Lock()
"""torch allows one capture at a time in a process, of whichever tower."""


class GraphedTower:
    """A fast tower on a GPU that captures graphs for the capacities it meets, and replays them.

    Any thread and any stream may call it: a lock serializes calls on the host, an event serializes them on the GPU.
    Weights may be loaded or replaced between calls. The tower owns this object, which has only a weak reference back.

    Args:
        tower: the tower, on a CUDA device.
    """

    def __init__(self, tower: FastTower) -> None:
        self._tower = weakref.ref(tower)
        self._lock = threading.Lock()
        self._prepared = OrderedDict[bytes, PreparedGrids]()
        self._sharing = GraphSharing(tower.config.merge_unit)
        self._capture_streams: dict[torch.device, torch.cuda.Stream] = {}
        self._reset()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Replace this by None in copies and pickles of a tower: they start without graphs."""
        return type(None), ()

    @property
    def tower(self) -> FastTower:
        """The tower that owns this; None after the tower is gone."""
        return cast(FastTower, self._tower())

    def _reset(self) -> None:
        """Drop all graphs, and start again with the weights as they are now."""
        weight = self.tower.patch_embed.weight
        self.device, self._is_fp32 = weight.device, weight.dtype == torch.float32
        self._weights = WeightGuard(self.tower)
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._graphs: OrderedDict[tuple[Capacity, object], Graph] = OrderedDict()
        self._pool_patches = 0
        self._has_captured = False
        with torch.cuda.device(self.device):
            if self.device not in self._capture_streams:  # a stream's workspaces stay allocated
                # High priority: torch hands out a few streams in rotation, and those of low priority to everyone.
                self._capture_streams[self.device] = torch.cuda.Stream(self.device, priority=-1)
            self._last_call_done = torch.cuda.Event()

    def __call__(self, pixel_values: Tensor | WritePixels, grid: CheckedGrid) -> TowerOutput:
        """Encode packed patches.

        Args:
            pixel_values: `[patches, C·T·P·P]` in any floating dtype, on any device; or what writes them, in the tower's
                dtype, where they will be read. It may be called more than once.
            grid: the grids of the same patches.

        Raises:
            ValueError: gradients are requested, the tower has forward hooks, or the current stream is being captured.
        """
        if torch.compiler.is_compiling() and isinstance(pixel_values, Tensor):
            return _encode_untraced()(self, pixel_values, grid.tensor)
        return self._encode(pixel_values, grid)

    def _encode(self, pixel_values: Tensor | WritePixels, grid: CheckedGrid) -> TowerOutput:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("the encoder captures graphs of its own: capture enc.tower(pixel_values, plan) in yours")
        if isinstance(pixel_values, Tensor):
            refuse_gradients([pixel_values])
        with self._lock:
            prepared = self._prepare(grid)
            captured = prepared.capacity is not None and self._graph_key(prepared.capacity) in self._graphs
            if not captured:
                self._reset_if_weights_moved()
            output = self._run(pixel_values, prepared)
            # Replay first and check for moved weights while the GPU works. Old memory stays allocated, so a stale
            # replay is safe; then run again.
            if captured and self._reset_if_weights_moved():
                output = self._run(pixel_values, prepared)
            refuse_gradients(self._weights.parameters)
        return output

    def release_memory(self) -> None:
        """Stop keeping the memory of the weights allocated: they are about to be moved."""
        with self._lock, CAPTURE_LOCK:  # a thread that waits for the GPU would break another's capture
            torch.cuda.synchronize(self.device)  # graphs may still be reading the weights
            self._weights.release_memory()

    def retain_memory(self) -> bool:
        """Keep the memory of the weights allocated again; return whether they were not moved after all."""
        with self._lock:
            self._weights.retain_memory()
            return self._weights.weights_unmoved()

    def _reset_if_weights_moved(self) -> bool:
        """Drop the graphs if the weights are no longer where the graphs read them; return whether that was so.

        Raises:
            ValueError: the tower has forward hooks.
        """
        if moved := not self._weights.weights_unmoved():
            with CAPTURE_LOCK:
                torch.cuda.synchronize(self.device)
            self._reset()
        self._weights.refuse_hooks()
        return moved

    def _run(self, pixel_values: Tensor | WritePixels, grids: PreparedGrids) -> TowerOutput:
        with self._serialized():
            if grids.capacity is None:
                return self._run_unpadded(pixel_values, grids)
            graph = self._graph_to_run(grids.capacity)
            return graph.replay(self._table(grids, graph.capacity.items), pixel_values, grids.needed.patches)

    def _table(self, grids: PreparedGrids, items: int) -> Tensor:
        if items not in grids.tables:
            grids.tables[items] = device_plan.grid_table(grids.grid, self.tower.config, items).pin_memory()
        return grids.tables[items]

    def _run_unpadded(self, pixel_values: Tensor | WritePixels, grids: PreparedGrids) -> TowerOutput:
        """Run a batch that is too large for a graph."""
        weight = self.tower.patch_embed.weight
        with _default_modes(self.device):
            if not isinstance(pixel_values, Tensor):
                write = pixel_values
                pixel_values = weight.new_empty(grids.needed.patches, self.tower.config.patch_dim)
                write(pixel_values)
            angles = self._angles_for(next_power_of_two(grids.needed.side))
            table = self._table(grids, grids.needed.items).to(self.device, non_blocking=True)
            plan = device_plan.compute_plan(table, angles, self.tower.config, grids.needed, self.tower.impl)
            return self.tower(pixel_values.to(self.device), plan)

    def _prepare(self, grid: CheckedGrid) -> PreparedGrids:
        key = grid.key or grid.tensor.numpy().tobytes()  # no key if torch.compile traced `check_grid`
        if key not in self._prepared:
            config = self.tower.config
            needed = device_plan.measure_grids(grid.tensor, config)
            capacity = capacity_for(needed, config.merge_unit) if needed.patches <= MAX_GRAPH_PATCHES else None
            self._prepared[key] = PreparedGrids(grid.tensor, needed, capacity, {})
            if len(self._prepared) > MAX_PREPARED_GRIDS:
                self._prepared.popitem(last=False)
        return self._prepared[key]

    @contextmanager
    def _serialized(self) -> Iterator[None]:
        """Make the GPU start this call's work after that of earlier calls, on whichever streams these ran."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._last_call_done)
        try:
            yield
        finally:  # also after a failure: work launched before it still runs
            self._last_call_done.record(stream)

    def warm_up(self, patches: int) -> int:
        """Capture the graphs of one image of every size up to `patches`, and return their number.

        Raises:
            ValueError: more than `MAX_GRAPH_PATCHES`, or the tower has forward hooks.
        """
        unit = self.tower.config.merge_unit
        if patches > MAX_GRAPH_PATCHES:
            expected = f"at most {MAX_GRAPH_PATCHES // unit}, beyond which no graph is used"
            raise ValueError(f"max_tokens: expected {expected}, got {patches // unit}")
        capacities, next_size = [], unit
        while next_size < patches + unit:
            capacities.append(single_image_capacity(next_size, self.tower.config))
            next_size = capacities[-1].patches + unit
        with self._lock:
            self._reset_if_weights_moved()
            with self._serialized():
                for capacity in tqdm(capacities[::-1], unit="graph", disable=None):
                    self._graph_for(capacity)
        return len(capacities)

    def _angles_for(self, side: int) -> tuple[Tensor, Tensor]:
        if side not in self._angles:
            self._angles[side] = device_plan.angle_tables(self.tower.config, side, self.device)
        return self._angles[side]

    def _graph_key(self, capacity: Capacity) -> tuple[Capacity, object]:
        if not self._is_fp32:
            return capacity, None
        matmul = torch.backends.cuda.matmul  # a graph keeps the precision of fp32 products that it was captured with
        return capacity, getattr(matmul, "fp32_precision", None) or matmul.allow_tf32

    def _graph_to_run(self, capacity: Capacity) -> Graph:
        """Return the graph to run a batch of this capacity in.

        In fp32 it is always its own: there cuBLAS gives other bits at other capacities.
        """
        if not self._is_fp32:
            has_own_graph = self._graph_key(capacity) in self._graphs
            capacity = self._sharing.choose(capacity, has_own_graph, (other for other, _ in self._graphs))
        return self._graph_for(capacity)

    def _graph_for(self, capacity: Capacity) -> Graph:
        """Return the graph of this capacity; capture it first if there is none."""
        key = self._graph_key(capacity)
        if key not in self._graphs:
            try:
                with CAPTURE_LOCK, _default_modes(self.device):
                    if capacity.patches > self._pool_patches:
                        self._allocate_pool(capacity.patches)
                    if key not in self._graphs:
                        self._capture(capacity)
            except BaseException:
                self._pool_patches = 0  # a pool may refuse captures after a failed one, so the next gets a new pool
                raise
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _allocate_pool(self, patches: int) -> None:
        """Start a new pool with a graph of at least `patches`: its memory is enough for all smaller graphs.

        Captured in rising order, each graph would add memory: the free memory that a smaller graph leaves cannot take
        the largest tensors of the next. Smaller graphs are captured again, in the new pool.
        """
        torch.cuda.synchronize(self.device)  # the graphs to be dropped may still be running
        self._graphs.clear()
        self._pool_patches = pool_patches_for(patches, grows=self._pool_patches > 0)
        capacity = single_image_capacity(self._pool_patches, self.tower.config)
        self._pool = torch.cuda.graph_pool_handle()
        self._capture(capacity)

    def _capture(self, capacity: Capacity) -> None:
        if len(self._graphs) >= MAX_GRAPHS:
            torch.cuda.synchronize(self.device)
            self._graphs.popitem(last=False)
        angles = self._angles_for(capacity.side)
        run_first = not self._has_captured
        stream = self._capture_streams[self.device]
        graph = Graph(self.tower, capacity, angles, stream, self._pool, run_first)
        self._has_captured = True
        self._graphs[self._graph_key(capacity)] = graph


@cache
def _encode_untraced() -> Callable[[GraphedTower, Tensor, Tensor], TowerOutput]:
    """Return a function that torch.compile does not trace: `_encode` of grids as a tensor.

    A decorator would do the same, but import Dynamo with the package.
    """

    def encode(graphs: GraphedTower, pixel_values: Tensor, grid_thw: Tensor) -> TowerOutput:
        grid = check_grid(grid_thw, graphs.tower.config.spatial_merge_size)  # for its key, unknown while tracing
        return graphs._encode(pixel_values, grid)

    return torch.compiler.disable(encode)


@contextmanager
def _default_modes(device: torch.device) -> Iterator[None]:
    """Set torch's modes whatever the caller's are: the tower's device, no inference mode, gradients or autocast."""
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield


def graphs_of(tower: nn.Module) -> GraphedTower | None:
    """Return the tower's graphs, made at the first call; None for a tower that does not run in graphs."""
    if not isinstance(tower, FastTower) or tower.impl == "reference" or not tower.patch_embed.weight.is_cuda:
        return None
    if not _has_own_graphs(tower):
        with CAPTURE_LOCK:
            if not _has_own_graphs(tower):
                tower.graphs = GraphedTower(tower)
    return cast(GraphedTower, tower.graphs)


def _has_own_graphs(tower: FastTower) -> bool:
    """Whether the tower has graphs of its own weights: a shallow copy of a tower has those of the original."""
    return tower.graphs is not None and tower.graphs.tower is tower
