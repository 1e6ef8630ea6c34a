"""One forward pass of the fast tower in a CUDA graph, and the memory that graphs use by turns."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwenvit import device_plan
from qwenvit.device_plan import Capacity
from qwenvit.fast import FastTower
from qwenvit.outputs import TowerOutput


@dataclass(frozen=True)
class Borrowed:
    """A tensor without its memory, which the graph that writes it keeps, and others write to as well."""

    address: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The bytes, as CUDA libraries for Python hand them to one another; there is no bfloat16 among its types."""
        bytes_of_all = self.shape.numel() * self.dtype.itemsize
        return {"version": 3, "typestr": "|u1", "shape": (bytes_of_all,), "data": (self.address, False)}

    def tensor(self, device: torch.device) -> Tensor:
        """To be read between a replay and whatever runs after it."""
        return torch.as_tensor(self, device=device).view(self.dtype).view(self.shape)


class Graph:
    """One captured forward pass.

    Args:
        tower: on a CUDA device.
        room: how much it takes.
        angles: of `device_plan.angle_tables`.
        pixels: `[patches, C·T·P·P]`, its pixel values' place.
        stream: that it is captured on.
        pool: of the memory it uses by turns with other graphs.
    """

    def __init__(
        self,
        tower: FastTower,
        room: Capacity,
        angles: tuple[Tensor, Tensor],
        pixels: Tensor,
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        config, weight = tower.config, tower.patch_embed.weight
        self.frames = tower.patch_embed.frames
        merge = config.spatial_merge_size
        self.merge_unit = config.merge_unit
        smallest = torch.tensor([[1, merge, merge]], device="cpu")
        self.table = device_plan.tabulate(smallest, config, room.items).to(weight.device)
        self.pixel_values = pixels

        def run() -> list[Tensor]:
            plan = device_plan.compute(self.table, angles, config, room, tower.impl)
            output = tower(self.pixel_values, plan)
            return [output.last_hidden_state, output.pooler_output, *output.deepstack_features]

        # Compiles kernels and sets libraries up, which a capture may not; on another stream, so that the capture's own
        # gets its cuBLAS workspace in the pool, where nobody else frees it.
        run()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = run()
        self.outputs = [Borrowed(x.data_ptr(), x.shape, x.dtype).tensor(x.device) for x in outputs]

    def replay(self, table: Tensor, pixel_values: Tensor) -> TowerOutput:
        """Run on the current stream; the result is a copy. `pixel_values` on the host are read before this returns."""
        patches = len(pixel_values)
        tokens = patches // self.merge_unit
        self.table.copy_(table, non_blocking=True)
        rows = self.pixel_values[:patches]
        if pixel_values.shape[1] < rows.shape[1]:  # one frame of still images; a copy would move its repetitions too
            pixel_values = pixel_values.to(rows.device, rows.dtype)
        self.frames(rows).copy_(self.frames(pixel_values), non_blocking=pixel_values.is_cuda)
        self.graph.replay()
        hidden, *merged = self.outputs
        written = [hidden[:patches], *(layer[:tokens] for layer in merged)]
        copies = [torch.empty_like(x) for x in written]
        torch._foreach_copy_(copies, written)
        return TowerOutput(copies[0], copies[1], copies[2:])
