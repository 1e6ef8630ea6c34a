"""The frames of a video, opened piece by piece: a long video is never in memory as a whole."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwenvit.preprocess.decode import Channels, ImageInput, check_array, open_image, snapshot
from qwenvit.preprocess.patch_processor import PatchProcessor
from qwenvit.preprocess.prepared import Grid, Prepared, PreparedFrames, compute_on_host

BYTES_PER_PIECE = 16 * 2**20
"""Most memory of the frames of a piece, unless a single group of frames exceeds it."""
PATCHES_PER_PIECE = 8192
"""Most patches of a piece, unless a single group of frames exceeds it."""


def sized_frames(frames: Iterable[ImageInput] | NDArray[Any] | Tensor) -> Any:
    """Return frames whose number is known: those of a generator are collected.

    Raises:
        TypeError: neither a list of images nor an array of them, or a tensor that is not dense.
        ValueError: an array of another number of dimensions or without values, or no frames.
    """
    if isinstance(frames, np.ndarray | Tensor):
        check_array(frames, "frames")
        if frames.ndim != 4:
            raise ValueError(f"frames: expected [frames, H, W, C] or [frames, C, H, W], got {list(frames.shape)}")
    if isinstance(frames, Image.Image | str | bytes) or not isinstance(frames, Iterable):
        expected = "the path of a video file, a list of images or one array of them"
        raise TypeError(f"frames: expected {expected}, got {type(frames).__name__}")
    sized = frames if isinstance(frames, Sized) else list(map(snapshot, frames))
    if not len(sized):
        raise ValueError("frames: expected at least one frame, got none")
    return sized


@dataclass(frozen=True)
class VideoPreparer:
    """Opens the frames of one video, a few groups at a time, from any thread."""

    processor: PatchProcessor
    frames: Iterable[ImageInput]
    size: tuple[int, int]
    """Height and width of every frame."""
    grid: Grid
    channels: Channels
    device: torch.device

    @property
    def frames_per_piece(self) -> int:
        """Frames of each piece but the last: whole groups."""
        group = self.processor.temporal_patch_size
        groups_by_bytes = BYTES_PER_PIECE // (group * 3 * self.size[0] * self.size[1])
        return group * max(1, min(groups_by_bytes, PATCHES_PER_PIECE // (self.grid[1] * self.grid[2])))

    def pieces(self) -> Iterator[list[ImageInput]]:
        """Yield the frames of each piece, drawn when it is asked for."""
        frames = iter(self.frames)
        while piece := list(islice(frames, self.frames_per_piece)):
            yield piece

    def __call__(self, index: int, piece: list[ImageInput]) -> Prepared:
        """Open the frames of a piece.

        Raises:
            TypeError: a frame of a type or dtype that is not supported.
            ValueError: a frame that cannot be used, or of another size than the first.
            OSError: a file that cannot be read.
        """
        start = index * self.frames_per_piece
        opened = [open_frame(frame, start + i, self.channels, self.device) for i, frame in enumerate(piece)]
        for i, frame in enumerate(opened):
            if frame.shape[1:] != self.size:
                sizes = [f"{height} x {width}" for height, width in (self.size, frame.shape[1:])]
                raise ValueError(f"frames[{start + i}]: expected the first frame's size, {sizes[0]}, got {sizes[1]}")
        groups = -(-len(piece) // self.processor.temporal_patch_size)
        stacked = _stack(opened, pinned=self.device.type == "cuda" and opened[0].is_cpu)
        prepared = PreparedFrames(stacked, (groups, *self.grid[1:]), self.processor, "torch")
        return prepared if self.device.type == "cuda" else compute_on_host(prepared)


def open_frame(frame: ImageInput, index: int, channels: Channels, device: torch.device) -> Tensor:
    """Open `frames[index]` as `[3, H, W]` uint8."""
    return open_image(frame, channels=channels, backend="torch", device=device, name=f"frames[{index}]")


def first_of(frames: Iterable[ImageInput]) -> tuple[ImageInput, Iterable[ImageInput]]:
    """Return the first frame, and all frames, without drawing the first again from an iterator."""
    iterator = iter(frames)
    first = next(iterator)
    return first, chain([first], iterator)


def _stack(frames: list[Tensor], pinned: bool) -> Tensor:
    """Stack frames `[3, H, W]` as `[F, 3, H, W]`, with the strides they have, so that whole rows are copied."""
    channels_last = frames[0].stride(0) == 1
    if channels_last:
        frames = [frame.permute(1, 2, 0) for frame in frames]
    if frames[0].is_cpu:
        stacked = torch.empty(len(frames), *frames[0].shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        for target, frame in zip(stacked.numpy(), frames, strict=True):
            np.copyto(target, frame.numpy())
    else:
        stacked = torch.stack(frames)
    return stacked.permute(0, 3, 1, 2) if channels_last else stacked
