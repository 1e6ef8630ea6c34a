"""Images between decoding and the tower: on a GPU, the rest of the preprocessing runs there."""

import math
from abc import ABC, abstractmethod
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
class Prepared(ABC):
    """An opened image, or frames of a video, that can be written as rows of pixel values."""

    data: Tensor
    """What `write` reads."""
    grid: Grid

    @property
    def num_bytes(self) -> int:
        """The memory that this keeps."""
        return self.data.nbytes

    def to(self, device: torch.device) -> Self:
        """Copy the data to the device, without waiting for it if they are in pinned memory."""
        return replace(self, data=self.data.to(device, non_blocking=True))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory from being reused before the work that is now queued on a stream is done."""
        self.data.record_stream(stream)

    @abstractmethod
    def write(self, out: Tensor) -> None:
        """Write the rows, `[patches, C·T·P·P]` in any floating dtype, on the device of the data."""


@dataclass(frozen=True)
class PreparedPixels(Prepared):
    """Pixel values `[patches, C·T·P·P]` float32 that were computed on the host."""

    def write(self, out: Tensor) -> None:
        """Copy the pixel values."""
        out.copy_(self.data)


@dataclass(frozen=True)
class PreparedFrames(Prepared):
    """Decoded frames `[F, 3, H, W]`, uint8 or float32 in [0, 1]: `write` resizes, normalises and cuts them."""

    processor: PatchProcessor
    resize: Backend

    def write(self, out: Tensor) -> None:
        """Compute the pixel values."""
        self.processor.write_patches(self.data, self.grid, self.resize, out)


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
