"""Maps of patch features, and pictures of their first three principal components in red, green and blue."""

from typing import Unpack

import torch
from PIL import Image
from torch import Tensor

from qwenvit.encoder import Encoder
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.preprocess.decode import ImageInput
from qwenvit.preprocess.options import ImageOptions


@torch.no_grad()
def patch_features(encoder: Encoder, image: ImageInput, **options: Unpack[ImageOptions]) -> Tensor:
    """Return the features of an image's patches after the last block, as a map.

    Args:
        encoder: a loaded encoder.
        image: a PIL image, a uint8 array or tensor, a path, or encoded bytes.
        options: min_pixels, max_pixels, max_tokens, size, resize, do_rescale, channels; see `ImageOptions`.

    Returns:
        `[rows, columns, hidden_size]` fp32 on the CPU, one entry a patch, in reading order.

    Raises:
        TypeError: an unknown option, or an image of a type or dtype that is not supported.
        ValueError: an impossible option, or an image that cannot be used.
        OSError: a file that cannot be read.
    """
    pixel_values, grid = encoder.image_processor([image], **options)
    features = encoder(pixel_values, grid).last_hidden_state.float().cpu()
    row, column = GridPlan.build(grid, encoder.config).position_ids.unbind(1)
    _, rows, columns = grid[0].tolist()
    feature_map = features.new_empty(rows, columns, features.shape[1])
    feature_map[row, column] = features
    return feature_map


def pca_picture(feature_map: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Colour each cell by its first three principal components, each scaled from its 1st to its 99th percentile.

    Args:
        feature_map: `[rows, columns, channels]` in any floating dtype.
        size: `(width, height)` of the picture in pixels. Default: one pixel a cell.

    Raises:
        ValueError: not floats `[rows, columns, channels]` with at least three channels.
    """
    if feature_map.ndim != 3 or feature_map.shape[-1] < 3 or not feature_map.is_floating_point():
        raise ValueError(
            f"feature_map: expected floats [rows, columns, channels >= 3], got {list(feature_map.shape)} "
            f"{feature_map.dtype}"
        )
    rows, columns, _ = feature_map.shape
    flat = feature_map.flatten(0, 1).double().cpu()
    centred = flat - flat.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    directions = directions[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary: make its largest entry positive, so that every machine draws the same colours.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = centred @ (directions * largest.sign())
    low, high = components.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    picture = Image.fromarray(colours.round().byte().unflatten(0, (rows, columns)).numpy())
    return picture if size is None else picture.resize(size, Image.Resampling.NEAREST)


def side_by_side(image: Image.Image, picture: Image.Image, gap: int = 8) -> Image.Image:
    """Return an image and its map side by side on white, both at the image's size, `gap` pixels apart."""
    image = image.convert("RGB")
    canvas = Image.new("RGB", (2 * image.width + gap, image.height), "white")
    canvas.paste(image, (0, 0))
    canvas.paste(picture.resize(image.size, Image.Resampling.NEAREST), (image.width + gap, 0))
    return canvas
