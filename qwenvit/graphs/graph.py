"""One forward pass of the fast tower at a capacity, and its capture in a CUDA graph whose pool other graphs share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwenvit import ops
from qwenvit.graphs import device_plan
from qwenvit.graphs.capacity import Capacity
from qwenvit.graphs.capture import capturing, garbage_collection_paused
from qwenvit.graphs.workspace import reserve_workspaces
from qwenvit.outputs import TowerOutput
from qwenvit.plan.inputs import WritePixels
from qwenvit.towers.fast import FastTower
from qwenvit.towers.hidden_states import iter_hidden_states

Layers = tuple[int, ...]
"""The hidden states that a pass is for, each once, the shallowest first; none for the whole pass."""


class GraphKey(NamedTuple):
    """What tells graphs apart."""

    capacity: Capacity
    precision: object
    """Of fp32 products; None in 16 bits."""
    layers: Layers


def memory_extent(layers: Layers) -> tuple[int, int]:
    """Return what a graph's memory depends on besides its size: the hidden states that it copies, and how far it goes.

    The second is 0 for the embedding, 1 with blocks, of which all take the same memory, and 2 with mergers.
    """
    return (len(layers) - 1, min(layers[-1], 1)) if layers else (0, 2)


@dataclass(frozen=True)
class UnownedTensor:
    """The address, shape and dtype of a tensor, without a reference to its memory.

    The graph that captured the tensor keeps the memory allocated; graphs that share its pool write to the same memory.
    """

    address: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "UnownedTensor":
        """Describe a tensor, which may be freed afterwards."""
        return cls(tensor.data_ptr(), tensor.shape, tensor.dtype)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The tensor's bytes, in the form that CUDA libraries for Python exchange; the form knows no bfloat16."""
        num_bytes = self.shape.numel() * self.dtype.itemsize
        return {"version": 3, "typestr": "|u1", "shape": (num_bytes,), "data": (self.address, False)}

    def tensor(self, device: torch.device) -> Tensor:
        """Return a tensor at the address. Write it right before a replay, or read it before anything else runs."""
        return torch.as_tensor(self, device=device).view(self.dtype).view(self.shape)


def write_pixels(rows: Tensor, pixel_values: Tensor | WritePixels) -> None:
    """Write pixel values, which may be on the host, to rows on the GPU."""
    if isinstance(pixel_values, Tensor):
        rows.copy_(pixel_values, non_blocking=pixel_values.is_cuda)
    else:
        pixel_values(rows)


class Graph:
    """One captured forward pass.

    Args:
        tower: the tower, on a CUDA device.
        capacity: the largest batch that the graph takes.
        angles: the cosines and sines from `device_plan.angle_tables`.
        stream: the stream to capture on.
        pool: the memory pool, which other graphs may share.
        run_first: run the pass before it is captured. The first pass of a tower initialises libraries, which a capture
            may not do; it may compile kernels.
        layers: hidden states: the pass stops after the last, and runs no merger.
    """

    def __init__(
        self,
        tower: FastTower,
        capacity: Capacity,
        angles: tuple[Tensor, Tensor],
        stream: torch.cuda.Stream,
        pool: Any,
        run_first: bool,
        layers: Layers = (),
    ) -> None:
        config, weight = tower.config, tower.patch_embed.weight
        merge = config.spatial_merge_size
        self.capacity, self.layers = capacity, layers
        self.merge_unit = config.merge_unit
        smallest = torch.tensor([[1, merge, merge]], device="cpu")
        table = device_plan.grid_table(smallest, config, capacity.items).pin_memory()
        self.table = table.to(weight.device, non_blocking=True)  # does not wait for earlier work
        self._host_table: Tensor | None = None  # the table that was last copied to `self.table`

        def run() -> list[UnownedTensor]:
            # Blocks overwrite hidden states: all but the last are copied. The copies are allocated at once and first,
            # since between the blocks' own allocations they would split the pool's free memory.
            copies = weight.new_empty(len(layers[:-1]), capacity.patches, config.hidden_size) if layers else None
            # Allocate rows as wide as the hidden states, so that these can reuse the memory: torch requests memory from
            # CUDA in segments, and a tensor cannot span two (TUNING.md).
            wide = weight.new_empty(capacity.patches * max(config.patch_dim, config.hidden_size))
            pixel_values = wide[: capacity.patches * config.patch_dim].view(capacity.patches, -1)
            unowned_input = UnownedTensor.of(pixel_values)
            plan = device_plan.compute_plan(self.table, angles, config, capacity, tower.impl)
            x = tower.embed(pixel_values, plan)
            del wide, pixel_values
            if copies is None:
                output = tower.transform(x, plan)
                outputs = [output.last_hidden_state, output.pooler_output, *output.deepstack_features]
            else:
                states = enumerate(iter_hidden_states(tower, x, plan, layers))
                outputs = [copies[i].copy_(state) if i < len(copies) else state for i, state in states]
            return [unowned_input, *map(UnownedTensor.of, outputs)]

        if run_first:
            run()  # not on the capture's stream: its workspaces must come from `reserve_workspaces`
        self.graph = torch.cuda.CUDAGraph()
        with garbage_collection_paused(), torch.cuda.stream(stream):
            reserved = reserve_workspaces(stream, weight)
            with capturing(self.graph, pool):
                unowned = run()
            del reserved
        self.pixel_values, *outputs = (part.tensor(weight.device) for part in unowned)
        rows = capacity.patches if layers else capacity.patches // self.merge_unit  # else a row a token
        self.outputs = [output.view(rows, -1) for output in outputs]
        self._input_rows = self.pixel_values  # the rows of `pixel_values` that the last batch had

    def replay(self, table: Tensor, pixel_values: Tensor | WritePixels, patches: int) -> TowerOutput:
        """Run the graph of a whole pass on the current stream.

        Args:
            table: `device_plan.grid_table` of the batch, for the capacity's items, in pinned host memory.
            pixel_values: `[patches, C·T·P·P]` on any device (the call returns only after it has read them from the
                host), or what writes them where the graph reads them.
            patches: of the batch.

        Returns:
            Copies of the graph's outputs, without padding.
        """
        self._launch(table, pixel_values, patches)
        hidden, pooled, *deepstack = ops.clone_rows(self.outputs, patches // self.merge_unit)
        return TowerOutput(hidden.view(patches, -1), pooled, deepstack)

    def replay_states(
        self, table: Tensor, pixel_values: Tensor | WritePixels, patches: int, order: Callable[[], Tensor]
    ) -> list[Tensor]:
        """Run the graph of `layers` on the current stream.

        Args:
            table: as for `replay`.
            pixel_values: as for `replay`.
            patches: of the batch.
            order: returns the order to put the batch's patches in, `[patches]` int64 in pinned host memory; it is
                called while the GPU works.

        Returns:
            `[patches, hidden_size]` for each of the layers, in new memory: the pass that reorders them is the copy.
        """
        self._launch(table, pixel_values, patches)
        index = order().to(self.pixel_values.device, non_blocking=True)
        return [output.index_select(0, index) for output in self.outputs]

    def _launch(self, table: Tensor, pixel_values: Tensor | WritePixels, patches: int) -> None:
        """Run the graph: the GPU waits until it is launched, so the host does as little as possible before."""
        if table is not self._host_table:
            self._host_table = None  # in case the copy fails
            self.table.copy_(table, non_blocking=True)
            self._host_table = table
        if self._input_rows.shape[0] != patches:  # `len` of a tensor is a function in Python
            self._input_rows = self.pixel_values[:patches]
        write_pixels(self._input_rows, pixel_values)
        self.graph.replay()
