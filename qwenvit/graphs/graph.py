"""One forward pass of the fast tower in a CUDA graph, and the memory that graphs use by turns."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenvit.graphs import device_plan
from qwenvit.graphs.capacity import Capacity
from qwenvit.outputs import TowerOutput
from qwenvit.towers.fast import FastTower


@dataclass(frozen=True)
class UnownedTensor:
    """A tensor without its memory, which the graph that uses it keeps, and others write to as well."""

    address: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "UnownedTensor":
        """A tensor that may go now: `tensor` gives it back."""
        return cls(tensor.data_ptr(), tensor.shape, tensor.dtype)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The bytes, as CUDA libraries for Python hand them to one another; there is no bfloat16 among its types."""
        bytes_of_all = self.shape.numel() * self.dtype.itemsize
        return {"version": 3, "typestr": "|u1", "shape": (bytes_of_all,), "data": (self.address, False)}

    def tensor(self, device: torch.device) -> Tensor:
        """To be written right before a replay, or read between one and whatever runs after it."""
        return torch.as_tensor(self, device=device).view(self.dtype).view(self.shape)


class Graph:
    """One captured forward pass.

    Args:
        tower: on a CUDA device.
        room: how much it takes.
        angles: of `device_plan.angle_tables`.
        stream: that it is captured on.
        pool: of the memory it uses by turns with other graphs.
    """

    def __init__(
        self,
        tower: FastTower,
        room: Capacity,
        angles: tuple[Tensor, Tensor],
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        config, weight = tower.config, tower.patch_embed.weight
        self.frames = tower.patch_embed.frames
        merge = config.spatial_merge_size
        self.merge_unit = config.merge_unit
        smallest = torch.tensor([[1, merge, merge]], device="cpu")
        self.table = device_plan.grid_table(smallest, config, room.items).to(weight.device)
        self._shown: Tensor | None = None

        def run() -> list[UnownedTensor]:
            # As wide as a block's rows, so that these may lie there afterwards: torch gets memory from CUDA piece by
            # piece, and a tensor lies in one. (Qwen2.5-VL-7B at 1344² takes 250 MiB in all so, and 272 otherwise.)
            wide = weight.new_empty(room.patches * max(config.patch_dim, config.hidden_size))
            pixel_values = wide[: room.patches * config.patch_dim].view(room.patches, -1)
            places = [UnownedTensor.of(pixel_values)]
            plan = device_plan.compute_plan(self.table, angles, config, room, tower.impl)
            x = tower.embed(pixel_values, plan)
            del wide, pixel_values
            output = tower.transform(x, plan)
            outputs = [output.last_hidden_state, output.pooler_output, *output.deepstack_features]
            return places + list(map(UnownedTensor.of, outputs))

        # Compiles kernels and sets libraries up, which a capture may not; on another stream, so that the capture's own
        # gets its cuBLAS workspace in the pool, where nobody else frees it.
        run()
        self.graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
            places = run()
        self.pixel_values, *self.outputs = (place.tensor(weight.device) for place in places)
        self._rows = self.pixel_values

    def replay(self, table: Tensor, pixel_values: Tensor) -> TowerOutput:
        """Run on the current stream; the result is a copy. `pixel_values` on the host are read before this returns.

        The GPU waits until the graph is launched: what comes before is as short as it can be.
        """
        patches = len(pixel_values)
        if table is not self._shown:
            self._shown = None
            self.table.copy_(table, non_blocking=True)
            self._shown = table
        if len(self._rows) != patches:
            self._rows = self.pixel_values[:patches]
        rows = self._rows
        if pixel_values.shape == rows.shape:
            rows.copy_(pixel_values, non_blocking=pixel_values.is_cuda)
        else:  # one frame of still images; a copy from the host would move its repetitions too
            self.frames(rows).copy_(self.frames(pixel_values.to(rows.device, rows.dtype)))
        self.graph.replay()
        tokens = patches // self.merge_unit
        hidden, *merged = self.outputs
        written = [hidden[:patches], *(layer[:tokens] for layer in merged)]
        copies = [torch.empty_like(x) for x in written]
        torch._foreach_copy_(copies, written)
        return TowerOutput(copies[0], copies[1], copies[2:])


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector of cycles stays away: were it to free somebody's graph, CUDA would give up the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
