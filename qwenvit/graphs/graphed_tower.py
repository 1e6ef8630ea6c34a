"""The fast tower in CUDA graphs: one graph for each capacity, which serves any grids that fit.

Chosen hidden states have graphs of their own, which stop after the deepest.

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
from functools import cache, partial
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
from qwenvit.graphs.graph import Graph, GraphKey, Layers, memory_extent
from qwenvit.graphs.sharing import GraphSharing
from qwenvit.graphs.weight_guard import WeightGuard
from qwenvit.outputs import TowerOutput
from qwenvit.plan.inputs import CheckedGrid, WritePixels, check_grid, sizes_of
from qwenvit.plan.reading_order import reading_order
from qwenvit.towers.fast import FastTower, refuse_gradients
from qwenvit.towers.hidden_states import ordered_hidden_states

MAX_GRAPHS = 512
"""Beyond this many graphs, the least recently used one is dropped. Graphs share a pool, so each costs little memory."""
MAX_PREPARED_GRIDS = 1024
"""Beyond this many different batches, the oldest prepared grids are dropped."""
MAX_READING_ORDERS = 64
"""Beyond this many different batches, the oldest reading order is dropped: it has a number for each patch."""
MAX_COUNTED_LAYERS = 64
"""Beyond this many different layers, it is forgotten how often capacities occurred with the oldest."""
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
        self._prepared = OrderedDict[tuple[int, ...], PreparedGrids]()
        self._reading_orders = OrderedDict[tuple[tuple[int, ...], bool], Tensor]()
        self._sharing = OrderedDict[Layers, GraphSharing]()
        self._capture_streams: dict[torch.device, torch.cuda.Stream] = {}
        self._reset()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Replace this by None in copies and pickles of a tower: they start without graphs."""
        return type(None), ()

    @property
    def tower(self) -> FastTower:
        """The tower that owns this; None after the tower is gone."""
        return cast(FastTower, self._tower())

    def serves(self, tower: FastTower) -> bool:
        """Whether these are graphs of this tower, of weights on a GPU: a shallow copy has those of the original."""
        return self._tower() is tower and self._weights.on_gpu()

    def _reset(self) -> None:
        """Drop all graphs, and start again with the weights as they are now."""
        weight = self.tower.patch_embed.weight
        self.device, self._is_fp32 = weight.device, weight.dtype == torch.float32
        self._weights = WeightGuard(self.tower)
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        self._graphs: OrderedDict[GraphKey, Graph] = OrderedDict()
        self._pool_patches = 0
        self._pool_extents: list[tuple[int, int]] = []
        self._deepest_run = -1  # the last layer of the deepest pass that has run; a whole pass goes one further
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
            return cast(TowerOutput, _encode_untraced()(self, pixel_values, grid.tensor))
        return cast(TowerOutput, self._encode(pixel_values, grid))

    def hidden_states(
        self, pixel_values: Tensor | WritePixels, grid: CheckedGrid, layers: Layers, by_token: bool
    ) -> list[Tensor]:
        """Compute hidden states in reading order, and nothing beyond the deepest.

        Args:
            pixel_values: as for a call.
            grid: the grids of the same patches.
            layers: which, at least one, each once, the shallowest first: 0 is the first block's input, k the output of
                the k-th block.
            by_token: the reading order is that of merged tokens, see `qwenvit.plan.reading_order.reading_order`.

        Returns:
            `[patches, hidden_size]` for each of the layers.

        Raises:
            ValueError: as for a call.
        """
        if torch.compiler.is_compiling() and isinstance(pixel_values, Tensor):
            return cast(list[Tensor], _encode_untraced()(self, pixel_values, grid.tensor, layers, by_token))
        return cast(list[Tensor], self._encode(pixel_values, grid, layers, by_token))

    def _encode(
        self, pixel_values: Tensor | WritePixels, grid: CheckedGrid, layers: Layers = (), by_token: bool = False
    ) -> TowerOutput | list[Tensor]:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("the encoder captures graphs of its own: capture enc.tower(pixel_values, plan) in yours")
        if isinstance(pixel_values, Tensor) and pixel_values.requires_grad:  # the call takes 13 µs on a cold host
            refuse_gradients([pixel_values])
        with self._lock:
            grids = self._prepare(grid)
            graph = None if grids.capacity is None else self._graphs.get(self._graph_key(grids.capacity, layers))
            if graph is None:
                self._reset_if_weights_moved()
                output = self._run(pixel_values, grids, layers, by_token)
            else:
                # Replay first, and count this use and check for moved weights while the GPU works. Old memory stays
                # allocated, so a stale replay is safe; then run again, without the stale graph's memory.
                with self._serialized():
                    output = self._replay(graph, pixel_values, grids, by_token)
                    self._graph_to_run(graph.capacity, layers)
                del graph
                if self._reset_if_weights_moved():
                    output = self._run(pixel_values, grids, layers, by_token)
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

    def _run(
        self, pixel_values: Tensor | WritePixels, grids: PreparedGrids, layers: Layers, by_token: bool
    ) -> TowerOutput | list[Tensor]:
        with self._serialized():
            if grids.capacity is None:
                return self._run_unpadded(pixel_values, grids, layers, by_token)
            return self._replay(self._graph_to_run(grids.capacity, layers), pixel_values, grids, by_token)

    def _replay(
        self, graph: Graph, pixel_values: Tensor | WritePixels, grids: PreparedGrids, by_token: bool
    ) -> TowerOutput | list[Tensor]:
        table, patches = self._table(grids, graph.capacity.items), grids.needed.patches
        if not graph.layers:
            return graph.replay(table, pixel_values, patches)
        return graph.replay_states(table, pixel_values, patches, partial(self._reading_order, grids, by_token))

    def _table(self, grids: PreparedGrids, items: int) -> Tensor:
        if items not in grids.tables:
            grids.tables[items] = device_plan.grid_table(grids.grid, self.tower.config, items).pin_memory()
        return grids.tables[items]

    def _reading_order(self, grids: PreparedGrids, by_token: bool) -> Tensor:
        """Return the index from the tower's order to reading order, in pinned host memory."""
        key = sizes_of(grids.grid), by_token
        if key not in self._reading_orders:
            self._reading_orders[key] = reading_order(grids.grid, self.tower.config, by_token).pin_memory()
            if len(self._reading_orders) > MAX_READING_ORDERS:
                self._reading_orders.popitem(last=False)
        return self._reading_orders[key]

    def _run_unpadded(
        self, pixel_values: Tensor | WritePixels, grids: PreparedGrids, layers: Layers, by_token: bool
    ) -> TowerOutput | list[Tensor]:
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
            pixel_values = pixel_values.to(self.device)
            if layers:
                index = self._reading_order(grids, by_token).to(self.device, non_blocking=True)
                return ordered_hidden_states(self.tower, pixel_values, plan, layers, index)
            return cast(TowerOutput, self.tower(pixel_values, plan))

    def _prepare(self, grid: CheckedGrid) -> PreparedGrids:
        sizes = grid.sizes or sizes_of(grid.tensor)
        prepared = self._prepared.get(sizes)
        if prepared is None:
            config = self.tower.config
            needed = device_plan.measure_grids(grid.tensor, config)
            capacity = capacity_for(needed, config.merge_unit) if needed.patches <= MAX_GRAPH_PATCHES else None
            own = grid.tensor.clone()  # the caller may write to the tensor, and tables are made later
            self._prepared[sizes] = prepared = PreparedGrids(own, needed, capacity, {})
            if len(self._prepared) > MAX_PREPARED_GRIDS:
                self._prepared.popitem(last=False)
        return prepared

    @contextmanager
    def _serialized(self) -> Iterator[None]:
        """Make the GPU start this call's work after that of earlier calls, on whichever streams these ran."""
        stream = torch.cuda.current_stream(self.device.index)  # a device takes torch more calls
        stream.wait_event(self._last_call_done)
        try:
            yield
        finally:  # also after a failure: work launched before it still runs
            self._last_call_done.record(stream)

    def warm_up(self, patches: int, layers: Layers = ()) -> int:
        """Capture the graphs of one image of every size up to `patches`, and return their number.

        Args:
            patches: of the largest image.
            layers: as for `hidden_states`; none for whole passes.

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
                    self._graph_for(capacity, layers)
        return len(capacities)

    def _angles_for(self, side: int) -> tuple[Tensor, Tensor]:
        if side not in self._angles:
            self._angles[side] = device_plan.angle_tables(self.tower.config, side, self.device)
        return self._angles[side]

    def _graph_key(self, capacity: Capacity, layers: Layers = ()) -> GraphKey:
        if not self._is_fp32:
            return GraphKey(capacity, None, layers)
        matmul = torch.backends.cuda.matmul  # a graph keeps the precision of fp32 products that it was captured with
        return GraphKey(capacity, getattr(matmul, "fp32_precision", None) or matmul.allow_tf32, layers)

    def _graph_to_run(self, capacity: Capacity, layers: Layers) -> Graph:
        """Return the graph to run a batch of this capacity in; other layers never share it.

        In fp32 it is always its own: there cuBLAS gives other bits at other capacities.
        """
        if not self._is_fp32:
            if layers not in self._sharing:
                self._sharing[layers] = GraphSharing(self.tower.config.merge_unit)
                if len(self._sharing) > MAX_COUNTED_LAYERS:
                    self._sharing.popitem(last=False)
            has_own_graph = self._graph_key(capacity, layers) in self._graphs
            same_layers = (key.capacity for key in self._graphs if key.layers == layers)
            capacity = self._sharing[layers].choose(capacity, has_own_graph, same_layers)
        return self._graph_for(capacity, layers)

    def _graph_for(self, capacity: Capacity, layers: Layers = ()) -> Graph:
        """Return the graph of this capacity and these layers; capture it first if there is none."""
        key = self._graph_key(capacity, layers)
        if key not in self._graphs:
            try:
                with CAPTURE_LOCK, _default_modes(self.device):
                    if capacity.patches > self._pool_patches:
                        self._start_pool(capacity.patches)
                    if not self._pool_has_room_for(layers):
                        self._extend_pool(layers)
                    if key not in self._graphs:
                        self._capture(capacity, layers)
            except BaseException:
                self._pool_patches = 0  # a pool may refuse captures after a failed one, so the next gets a new pool
                raise
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _start_pool(self, patches: int) -> None:
        """Start a new pool for graphs of at least `patches`. All graphs are captured again, in the new pool."""
        torch.cuda.synchronize(self.device)  # the graphs to be dropped may still be running
        self._graphs.clear()
        self._pool_patches = pool_patches_for(patches, grows=self._pool_patches > 0)
        self._pool_extents.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def _pool_has_room_for(self, layers: Layers) -> bool:
        """Whether a graph as large as the pool is for was captured that kept as many layers and went as far."""
        copies, reach = memory_extent(layers)
        return any(copies <= most_copies and reach <= furthest for most_copies, furthest in self._pool_extents)

    def _extend_pool(self, layers: Layers) -> None:
        """Capture a graph as large as the pool is for: its memory is enough for all smaller ones of the same layers.

        Captured in rising order, each graph would add memory: the free memory that a smaller graph leaves cannot take
        the largest tensors of the next.
        """
        self._capture(single_image_capacity(self._pool_patches, self.tower.config), layers)
        self._pool_extents.append(memory_extent(layers))

    def _capture(self, capacity: Capacity, layers: Layers) -> None:
        if len(self._graphs) >= MAX_GRAPHS:
            torch.cuda.synchronize(self.device)
            self._graphs.popitem(last=False)
        angles = self._angles_for(capacity.side)
        last_layer = layers[-1] if layers else self.tower.config.depth + 1
        run_first = last_layer > self._deepest_run
        stream = self._capture_streams[self.device]
        graph = Graph(self.tower, capacity, angles, stream, self._pool, run_first, layers)
        self._deepest_run = max(last_layer, self._deepest_run)
        self._graphs[self._graph_key(capacity, layers)] = graph


@cache
def _encode_untraced() -> Callable[..., TowerOutput | list[Tensor]]:
    """Return a function that torch.compile does not trace: `_encode` of grids as a tensor.

    A decorator would do the same, but import Dynamo with the package.
    """

    def encode(
        graphs: GraphedTower, pixel_values: Tensor, grid_thw: Tensor, layers: Layers = (), by_token: bool = False
    ) -> TowerOutput | list[Tensor]:
        grid = check_grid(grid_thw, graphs.tower.config.spatial_merge_size)  # for its sizes, unknown while tracing
        return graphs._encode(pixel_values, grid, layers, by_token)

    return torch.compiler.disable(encode)


@contextmanager
def _default_modes(device: torch.device) -> Iterator[None]:
    """Set torch's modes whatever the caller's are: the tower's device, no inference mode, gradients or autocast."""
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False):
        yield


def graphs_of(tower: nn.Module) -> GraphedTower | None:
    """Return the tower's graphs, made at the first call; None for a tower that does not run in graphs."""
    if not isinstance(tower, FastTower) or tower.impl == "reference":
        return None
    graphs: GraphedTower | None = tower.graphs
    if graphs is not None and graphs.serves(tower):
        return graphs
    if not tower.patch_embed.weight.is_cuda:
        return None
    with CAPTURE_LOCK:
        if tower.graphs is None or not tower.graphs.serves(tower):
            tower.graphs = GraphedTower(tower)
        return cast(GraphedTower, tower.graphs)
