"""One forward pass of the fast tower at a capacity, and its capture in a CUDA graph whose pool other graphs share."""

from dataclasses import dataclass
from typing import Any

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
    """

    def __init__(
        self,
        tower: FastTower,
        capacity: Capacity,
        angles: tuple[Tensor, Tensor],
        stream: torch.cuda.Stream,
        pool: Any,
        run_first: bool,
    ) -> None:
        config, weight = tower.config, tower.patch_embed.weight
        merge = config.spatial_merge_size
        self.capacity = capacity
        self.merge_unit = config.merge_unit
        smallest = torch.tensor([[1, merge, merge]], device="cpu")
        table = device_plan.grid_table(smallest, config, capacity.items).pin_memory()
        self.table = table.to(weight.device, non_blocking=True)  # does not wait for earlier work
        self._host_table: Tensor | None = None  # the table that was last copied to `self.table`

        def run() -> list[UnownedTensor]:
            # Allocate rows as wide as the hidden states, so that these can reuse the memory: torch requests memory from
            # CUDA in segments, and a tensor cannot span two (TUNING.md).
            wide = weight.new_empty(capacity.patches * max(config.patch_dim, config.hidden_size))
            pixel_values = wide[: capacity.patches * config.patch_dim].view(capacity.patches, -1)
            unowned_input = UnownedTensor.of(pixel_values)
            plan = device_plan.compute_plan(self.table, angles, config, capacity, tower.impl)
            x = tower.embed(pixel_values, plan)
            del wide, pixel_values
            output = tower.transform(x, plan)
            outputs = [output.last_hidden_state, output.pooler_output, *output.deepstack_features]
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
        self.outputs = [output.view(capacity.patches // self.merge_unit, -1) for output in outputs]  # a row a token
        self._input_rows = self.pixel_values  # the rows of `pixel_values` that the last batch had

    def replay(self, table: Tensor, pixel_values: Tensor | WritePixels, patches: int) -> TowerOutput:
        """Run the graph on the current stream.

        The GPU waits until the graph is launched, so the host does as little as possible before.

        Args:
            table: `device_plan.grid_table` of the batch, for the capacity's items, in pinned host memory.
            pixel_values: `[patches, C·T·P·P]` on any device (the call returns only after it has read them from the
                host), or what writes them where the graph reads them.
            patches: of the batch.

        Returns:
            Copies of the graph's outputs, without padding.
        """
        if table is not self._host_table:
            self._host_table = None  # in case the copy fails
            self.table.copy_(table, non_blocking=True)
            self._host_table = table
        if len(self._input_rows) != patches:
            self._input_rows = self.pixel_values[:patches]
        write_pixels(self._input_rows, pixel_values)
        self.graph.replay()
        hidden, pooled, *deepstack = ops.clone_rows(self.outputs, patches // self.merge_unit)
        return TowerOutput(hidden.view(patches, -1), pooled, deepstack)
