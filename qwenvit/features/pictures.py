"""Pictures of feature maps: principal components in red, green and blue, and similarities to one patch.

What is drawn together shares its colours: one PCA, or one scale, over all maps that are given.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

HEAT = ((13, 22, 58), (38, 84, 141), (60, 152, 148), (190, 205, 105), (255, 244, 190))
"""Colours from the least to the most similar patch, each brighter than the one before."""
CELL = 16
"""Pixels of a cell's side, unless the caller says."""


def pca_pictures(maps: Sequence[Tensor], cell: int = CELL) -> list[Image.Image]:
    """Colour each cell by its first three principal components, those of all maps together.

    Equal colours mean similar features, in one picture and across all pictures of one call. Each component is scaled
    from its 1st to its 99th percentile. Maps of different layers have no directions in common: draw them in calls of
    their own. The pictures are the same on every machine that has the same features.

    Args:
        maps: `[rows, columns, channels]` each, in any floating dtype and of any sizes, with the same channels.
        cell: pixels of a cell's side.

    Returns:
        A picture for each map, the first component in red, the second in green, the third in blue.

    Raises:
        TypeError: not a sequence of tensors.
        ValueError: no maps; not floats `[rows, columns, channels]` of the same three or more channels; NaN or infinity.
    """
    check_maps(maps)
    channels = maps[0].shape[-1]
    mean = torch.zeros(channels, dtype=torch.float64, device="cpu")
    scatter = torch.zeros(channels, channels, dtype=torch.float64, device="cpu")
    for one in maps:  # one at a time in float64: together they may be larger than memory
        mean += _cells(one).sum(0)
    mean /= sum(one.shape[:2].numel() for one in maps)
    for one in maps:
        centred = _cells(one) - mean
        scatter += centred.T @ centred
    _, directions = torch.linalg.eigh(scatter)
    directions = directions[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary: make its largest entry positive, so that every machine draws the same colours.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()
    components = [(_cells(one) - mean) @ directions for one in maps]
    low, high = np.quantile(torch.cat(components).numpy(), [0.01, 0.99], axis=0)
    scale = 255 / np.maximum(high - low, 1e-12)
    return [
        _picture(((rows.numpy() - low) * scale).reshape(*one.shape[:2], 3), cell)
        for rows, one in zip(components, maps, strict=True)
    ]


def similarity_maps(maps: Sequence[Tensor], query: Tensor) -> list[Tensor]:
    """Return the cosine of each cell's features and a query's.

    Args:
        maps: `[rows, columns, channels]` each, in any floating dtype and of any sizes.
        query: `[channels]`, such as `maps[0][row, column]`.

    Returns:
        `[rows, columns]` float64 on the CPU for each map, from -1 to 1; 0 for features of zeros.

    Raises:
        TypeError: not a sequence of tensors.
        ValueError: no maps; not floats `[rows, columns, channels]`; NaN or infinity; a query of another shape.
    """
    check_maps(maps)
    channels = maps[0].shape[-1]
    if query.shape != (channels,):
        raise ValueError(f"query: expected [{channels}], as many as the maps have channels, got {list(query.shape)}")
    if not query.isfinite().all():
        raise ValueError("query: expected finite features, got NaN or infinity")
    direction = normalize(_on_host(query), dim=0)
    return [normalize(_on_host(one), dim=-1) @ direction for one in maps]


def similarity_pictures(similarities: Sequence[Tensor], cell: int = CELL) -> list[Image.Image]:
    """Colour similarities from the lowest of all pictures, dark blue, to the highest, light yellow.

    Args:
        similarities: `[rows, columns]` each, of any sizes, as `similarity_maps` returns them.
        cell: pixels of a cell's side.

    Raises:
        ValueError: no maps; not floats `[rows, columns]`; NaN or infinity.
    """
    if not len(similarities) or any(one.ndim != 2 or not one.is_floating_point() for one in similarities):
        raise ValueError(f"similarities: expected floats [rows, columns], got {_shapes(similarities)}")
    if not all(one.isfinite().all() for one in similarities):
        raise ValueError("similarities: expected finite ones, got NaN or infinity")
    values = [_on_host(one).numpy() for one in similarities]
    low, high = min(one.min() for one in values), max(one.max() for one in values)
    stops = np.linspace(0, 1, len(HEAT))
    pictures = []
    for one in values:
        shades = (one - low) / max(high - low, 1e-12)
        colours = [np.interp(shades, stops, channel) for channel in zip(*HEAT, strict=True)]
        pictures.append(_picture(np.stack(colours, -1), cell))
    return pictures


def check_maps(maps: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError unless maps can be drawn together."""
    if foreign := [type(one).__name__ for one in maps if not isinstance(one, Tensor)]:
        raise TypeError(f"maps: expected tensors, such as [item.maps[0] for item in features], got {foreign[0]}")
    if not len(maps) or any(
        one.ndim != 3 or one.shape[-1] < 3 or one.shape[-1] != maps[0].shape[-1] or not one.is_floating_point()
        for one in maps
    ):
        raise ValueError(
            f"maps: expected floats [rows, columns, channels], three or more and the same in each, got {_shapes(maps)}"
        )
    if not all(one.isfinite().all() for one in maps):
        raise ValueError("maps: expected finite features, got NaN or infinity")


def _cells(one: Tensor) -> Tensor:
    """Return a map's cells, `[cells, channels]`."""
    return _on_host(one).flatten(0, 1)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _picture(colours: NDArray[np.float64], cell: int) -> Image.Image:
    picture = Image.fromarray(colours.clip(0, 255).round().astype(np.uint8))
    return picture.resize((picture.width * cell, picture.height * cell), Image.Resampling.NEAREST)


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{list(one.shape)} {one.dtype}" for one in tensors[:4]) or "none"
