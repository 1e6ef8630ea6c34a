"""Images between decoding and the tower: on a GPU, the rest of the preprocessing runs there."""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from qwenvit.preprocess.decode import Backend
from qwenvit.preprocess.patch_processor import PatchProcessor

Grid = tuple[int, int, int]
"""Groups of frames, rows and columns of patches."""


@dataclass(frozen=True)
class PreparedPixels:
    """Pixel values that were computed on the host."""

    pixel_values: Tensor
    """`[patches, C·T·P·P]` float32."""
    grid: Grid

    @property
    def num_bytes(self) -> int:
        """The memory that this keeps."""
        return self.pixel_values.nbytes

    def to(self, device: torch.device) -> Self:
        """Copy the pixel values to the device, without waiting for it if they are in pinned memory."""
        return replace(self, pixel_values=self.pixel_values.to(device, non_blocking=True))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory from being reused before the work that is now queued on a stream is done."""
        self.pixel_values.record_stream(stream)

    def write(self, out: Tensor) -> None:
        """Write the rows of the image, `[patches, C·T·P·P]` in any floating dtype."""
        out.copy_(self.pixel_values)


@dataclass(frozen=True)
class PreparedFrames:
    """Decoded frames that are still to be resized, normalised and cut into patches, on the device of `write`."""

    frames: Tensor
    """`[F, 3, H, W]` uint8, or float32 in [0, 1]."""
    grid: Grid
    processor: PatchProcessor
    resize: Backend

    @property
    def num_bytes(self) -> int:
        """The memory that this keeps."""
        return self.frames.nbytes

    def to(self, device: torch.device) -> Self:
        """Copy the frames to the device, without waiting for it if they are in pinned memory."""
        return replace(self, frames=self.frames.to(device, non_blocking=True))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory from being reused before the work that is now queued on a stream is done."""
        self.frames.record_stream(stream)

    def write(self, out: Tensor) -> None:
        """Write the rows of the frames, `[patches, C·T·P·P]` in any floating dtype, on the device of the frames."""
        self.processor.write_patches(self.frames, self.grid, self.resize, out)


Prepared = PreparedPixels | PreparedFrames


def compute_on_host(frames: PreparedFrames, pinned: bool = False) -> PreparedPixels:
    """Compute the pixel values of frames on the CPU at once, in this thread."""
    processor = frames.processor
    shape = (math.prod(frames.grid), processor.patch_dim)
    pixel_values = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
    frames.write(pixel_values)
    return PreparedPixels(pixel_values, frames.grid)


def pinned_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor on the CPU to pinned memory, if it is not there; torch keeps the memory for later copies.

    numpy copies in the calling thread alone: torch would start a team of threads for every thread that decodes.
    """
    if tensor.is_pinned():
        return tensor
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    np.copyto(pinned.numpy(), tensor.numpy())
    return pinned
