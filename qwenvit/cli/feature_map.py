"""Looking at features: the first three principal components of the patches as red, green and blue."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwenvit.encoder import Encoder
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.preprocess.decode import ImageInput


@torch.no_grad()
def patch_features(encoder: Encoder, image: ImageInput, **options: Any) -> Tensor:
    """Features of an image's patches after the last block, as a map.

    Args:
        encoder: a loaded encoder.
        image: one image, as `Encoder.encode` takes it.
        **options: of the image processor.

    Returns:
        `[rows, columns, hidden_size]` fp32 on the CPU; rows and columns of patches, in reading order whatever the
        order inside the tower.
    """
    pixel_values, grid = encoder.image_processor([image], **options)
    features = encoder(pixel_values, grid).last_hidden_state.float().cpu()
    row, column = GridPlan.build(grid, encoder.config).position_ids.unbind(1)
    _, rows, columns = grid[0].tolist()
    feature_map = features.new_empty(rows, columns, features.shape[1])
    feature_map[row, column] = features
    return feature_map


def pca_picture(feature_map: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """Colour each place by its first three principal components, each stretched over its 1st to 99th percentile.

    Args:
        feature_map: `[rows, columns, channels]` in any floating dtype.
        size: `(width, height)` of the picture in pixels; default: one pixel a place.

    Raises:
        ValueError: not a map of at least three channels.
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
    # An eigenvector's sign is arbitrary; the largest entry positive makes the picture the same everywhere.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = centred @ (directions * largest.sign())
    low, high = components.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    picture = Image.fromarray(colours.round().byte().unflatten(0, (rows, columns)).numpy())
    return picture if size is None else picture.resize(size, Image.Resampling.NEAREST)


def side_by_side(image: Image.Image, picture: Image.Image, gap: int = 8) -> Image.Image:
    """An image and its map next to each other on white, both at the image's size."""
    image = image.convert("RGB")
    sheet = Image.new("RGB", (2 * image.width + gap, image.height), "white")
    sheet.paste(image, (0, 0))
    sheet.paste(picture.resize(image.size, Image.Resampling.NEAREST), (image.width + gap, 0))
    return sheet
