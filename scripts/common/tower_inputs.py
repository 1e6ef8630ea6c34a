"""One input of a whole vision tower: its grid, seeded pixel values, and the types of the calls that benchmarks time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str
    grid: tuple[tuple[int, int, int], ...]
    """Frame groups, rows and columns of patches of each item."""
    frames: int = 0
    """Frames of a video before they are grouped; 0 for images."""

    @property
    def patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grid)

    def grid_thw(self) -> Tensor:
        """Return the grid as an int64 CPU tensor `[items, 3]`."""
        return torch.tensor(self.grid, device="cpu")


Outputs = list[Tensor]
"""Merged tokens, then the DeepStack features of each level."""
TowerCall = Callable[[], Outputs]
PrepareCall = Callable[[Case, Tensor], TowerCall]
"""Case and pixel values -> the call to time; raises ValueError with the reason where a tower cannot run the case."""


def pixel_values(case: Case, config: VisionConfig, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return seeded normal pixel values `[patches, C·T·P·P]`.

    The frames of a patch are equal, as they are for a still; a video's frame groups differ from one another.
    """
    generator = torch.Generator(device).manual_seed(0)
    side = config.patch_size
    one_frame = torch.randn(case.patches, config.in_channels, 1, side, side, generator=generator, device=device)
    return one_frame.expand(-1, -1, config.temporal_patch_size, -1, -1).flatten(1).to(dtype)


def picture_of(pixels: Tensor, case: Case, config: VisionConfig) -> Tensor:
    """Reassemble the picture `[1, channels, height, width]` from the pixel values of a case with a single image."""
    (_, h, w), merge, side = case.grid[0], config.spatial_merge_size, config.patch_size
    patches = pixels.view(h // merge, w // merge, merge, merge, config.in_channels, -1, side, side)[..., 0, :, :]
    return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, config.in_channels, h * side, w * side)
