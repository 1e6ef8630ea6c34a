"""The integer weights by which Pillow and torch resize 8-bit images along one axis."""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

ResizeRule = Literal["pillow", "torch"]
RESIZE_RULES = ("pillow", "torch")
MAX_CACHED_PLANS = 64
"""The tables of a large photograph have about 200 KB."""


class ResizePass(NamedTuple):
    """One of the two passes of a resize, along one axis."""

    vertical: bool
    """Whether the pass changes the height; otherwise it changes the width."""
    size: int
    """Pixels along the axis after the pass."""
    taps: int
    """Weights of a result."""
    precision: int
    """Bits of the weights after the binary point. A result is `(sum + half) >> precision`, clamped to a byte."""


class ResizePlan(NamedTuple):
    """The passes that resize an image, in order, and their weights in fixed point."""

    passes: tuple[ResizePass, ...]
    """One or two: a pass that keeps its size would copy the bytes and is left out; one remains if both do."""
    table: Tensor
    """int32 on the CPU, the tables of the passes one after another, each `[size, 1 + taps]` and padded to 16 bytes: for
    each result its first pixel, then the weights of the pixels from there on. All these pixels exist; weights of zero
    fill up the rows."""

    def tables(self, table: Tensor) -> list[Tensor]:
        """Return the tables of the passes as views of `table`, or of a copy of it on another device."""
        sizes = [one.size * (1 + one.taps) for one in self.passes]
        parts = table.split([_aligned(size) for size in sizes])
        return [part[:size].view(-1, 1 + one.taps) for one, size, part in zip(self.passes, sizes, parts, strict=True)]


@lru_cache(maxsize=MAX_CACHED_PLANS)
def resize_plan(
    size: tuple[int, int], new_size: tuple[int, int], rule: ResizeRule, vertical_first: bool, pinned: bool
) -> ResizePlan:
    """Return how to resize an image.

    Args:
        size: height and width of the image, in pixels.
        new_size: height and width after resizing.
        rule: whose weights.
        vertical_first: whether the vertical pass runs before the horizontal one.
        pinned: keep the table in pinned memory, from where it is copied to a GPU without waiting for it.
    """
    axes = (0, 1) if vertical_first else (1, 0)
    changed = [axis for axis in axes if size[axis] != new_size[axis]] or [0]
    passes, tables = [], []
    for axis in changed:
        table, precision = _table(size[axis], new_size[axis], rule)
        passes.append(ResizePass(axis == 0, len(table), table.shape[1] - 1, precision))
        tables.append(F.pad(torch.from_numpy(table).flatten(), (0, _aligned(table.size) - table.size)))
    joined = torch.cat(tables)
    return ResizePlan(tuple(passes), joined.pin_memory() if pinned else joined)


def _aligned(size: int) -> int:
    """Round up to whole 16 bytes of int32: Triton compiles a kernel for each alignment of an argument."""
    return -(-size // 4) * 4


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Evaluate the cubic convolution kernel with a = -1/2, rounded in each step as Pillow and torch do."""
    x, a = np.abs(x), -0.5
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _table(size: int, new_size: int, rule: ResizeRule) -> tuple[NDArray[np.int32], int]:
    """Return the table and precision of a pass from `size` to `new_size` pixels (`ResizePlan`).

    A result is centred at `(i + 1/2) · size / new_size`. Its weights are the bicubic kernel, widened by the scale where
    the size shrinks, divided by their sum in float64, and rounded to integers, halves away from zero.

    Source: `precompute_coeffs` and `normalize_coeffs_8bpc` in Pillow's Resample.c: 22 bits after the binary point.
    torch's `upsample_bicubic2d_aa` of uint8 on the CPU: as many bits as keep the largest weight below 2^15, at most 22.
    """
    scale = size / new_size
    widening = max(scale, 1.0)
    centers = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centers - 2 * widening + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + 2 * widening + 0.5).astype(np.int64), size)
    taps = int((last - first).max())
    start = np.minimum(first, size - taps)  # every row reads pixels that exist
    pixels = start[:, None] + np.arange(taps)
    weights = _bicubic((pixels - centers[:, None] + 0.5) * (1.0 / widening))
    weights[(pixels < first[:, None]) | (pixels >= last[:, None])] = 0
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]  # added one after another, as they do
    precision = 22
    if rule == "torch":
        while int(0.5 + weights.max() * (1 << precision)) >= 1 << 15:
            precision -= 1
    fixed = weights * (1 << precision)
    fixed = np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5))
    return np.concatenate((start[:, None], fixed), axis=1).astype(np.int32), precision
