"""`qwenvit picture`: what a tower makes of images, a row an image and a column a layer."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from PIL import Image
from torch import Tensor

from qwenvit.cli.loading import CommandError, load, pixel_bounds
from qwenvit.cli.terminal import one_line, printable, say
from qwenvit.datasets.find import Records, find_records
from qwenvit.encoder import Encoder
from qwenvit.features.maps import ItemFeatures
from qwenvit.features.pictures import pca_pictures, similarity_maps, similarity_pictures
from qwenvit.features.sheet import contact_sheet, fit, outline_cell, stretch
from qwenvit.preprocess.decode import open_image


@dataclass(frozen=True)
class _Opened:
    """A decoded image."""

    name: str
    pixels: Tensor
    """`[3, H, W]` uint8."""


@dataclass(frozen=True)
class _Column:
    """A layer: its caption, and its map of each image with a pixel for each cell."""

    caption: str
    pictures: list[Image.Image]


def picture(arguments: argparse.Namespace) -> int:
    """Draw principal components, or similarities to one cell, of the features of chosen layers."""
    target = arguments.output.expanduser()
    if arguments.limit < 1 or arguments.side < 1:
        raise CommandError(f"--limit, --side: expected at least 1, got {arguments.limit} and {arguments.side}")
    if Image.registered_extensions().get(target.suffix.lower()) not in Image.SAVE:
        raise CommandError(f"--output: expected the name of a picture, such as features.png, got {target}")
    records = [find_records([one]) for one in arguments.images]  # apart: images of two folders may share a name
    encoder = load(arguments)
    images, failed = _open(records, encoder, arguments)
    if not images:
        return 1
    options: dict[str, Any] = pixel_bounds(arguments) | {"channels": "first"}
    pixels = [image.pixels for image in images]
    features = encoder.features(pixels, arguments.layers, what=arguments.what, norm=arguments.norm, **options)
    query = _query(arguments, features[0], images[0])
    columns = [
        _column(f"layer {layer} of {encoder.config.depth}", [item.maps[index] for item in features], query)
        for index, layer in enumerate(features[0].layers)
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    _sheet(images, columns, (features[0].grid[1:], query), arguments).save(target)
    for image, item in zip(images, features, strict=True):
        say(f"{printable(image.name)}: {item.grid[1]}x{item.grid[2]} {arguments.what}")
    shown = "; ".join(column.caption for column in columns)
    say(f"{len(images)} of {len(images) + failed} images, {shown} -> {printable(str(target))}")
    return 1 if failed else 0


def _open(records: Sequence[Records], encoder: Encoder, arguments: argparse.Namespace) -> tuple[list[_Opened], int]:
    """Decode the images; name those that cannot be used, and return how many these are.

    Raises:
        CommandError: the first image cannot be used, and is to be compared with.
    """
    processor = encoder.image_processor.with_bounds(**pixel_bounds(arguments))
    images: list[_Opened] = []
    failed = 0
    every = chain.from_iterable(records)
    for record in islice(every, arguments.limit):
        try:
            pixels = open_image(record.open())
            processor.grid_for(*pixels.shape[1:])
        except (OSError, TypeError, ValueError) as error:
            if not images and (arguments.query or arguments.query_pixel):
                raise CommandError(f"{record.id}, which --query and --query-pixel need: {error}") from error
            failed += 1
            say(f"qwenvit: error: {printable(record.id)}: {one_line(error)}", sys.stderr)
        else:
            images.append(_Opened(record.id, pixels))
    if next(every, None) is not None:
        exact = not any(one.has_archives for one in records)  # of archives the number is an estimate
        total = f" of {sum(one.expected or 0 for one in records)}" if exact else ""
        say(f"qwenvit: warning: only the first {arguments.limit}{total} images; --limit draws more", sys.stderr)
    return images, failed


def _query(arguments: argparse.Namespace, first: ItemFeatures, image: _Opened) -> tuple[int, int] | None:
    """Return the row and column of the cell to compare with, in the first image's map.

    Raises:
        CommandError: it is outside the map.
    """
    rows, columns = first.grid[1:]
    height, width = image.pixels.shape[1:]
    if arguments.query is not None:
        row, column = arguments.query
        wanted = f"--query: expected a row of 0 to {rows - 1} and a column of 0 to {columns - 1}, got {row},{column}"
    elif arguments.query_pixel is not None:
        x, y = arguments.query_pixel
        row, column = y * rows // height, x * columns // width
        wanted = f"--query-pixel: expected x of 0 to {width - 1} and y of 0 to {height - 1}, got {x},{y}"
    else:
        return None
    if not (0 <= row < rows and 0 <= column < columns):
        raise CommandError(f"{wanted} ({image.name})")
    return row, column


def _column(caption: str, maps: Sequence[Tensor], query: tuple[int, int] | None) -> _Column:
    if query is None:
        return _Column(caption, pca_pictures(maps, cell=1))
    similarities = similarity_maps(maps, maps[0][query])
    low, high = min(float(one.min()) for one in similarities), max(float(one.max()) for one in similarities)
    return _Column(
        f"{caption}: cosine {low:.2f} (dark) to {high:.2f} (light)", similarity_pictures(similarities, cell=1)
    )


def _sheet(
    images: Sequence[_Opened],
    columns: Sequence[_Column],
    query: tuple[tuple[int, int], tuple[int, int] | None],
    arguments: argparse.Namespace,
) -> Image.Image:
    """Return the sheet; `query` is the first image's grid, and the cell to outline in it or None."""
    rows = []
    for number, image in enumerate(images):
        tile = fit(Image.fromarray(image.pixels.permute(1, 2, 0).contiguous().numpy()), arguments.side)
        maps = [stretch(column.pictures[number], tile.size) for column in columns]
        rows.append(maps if arguments.map_only else [tile, *maps])
    grid, cell = query
    if cell is not None:
        rows[0] = [outline_cell(one, grid, cell) for one in rows[0]]
    if arguments.map_only:
        return contact_sheet(rows)
    return contact_sheet(rows, ["", *(column.caption for column in columns)], [[image.name] for image in images])
