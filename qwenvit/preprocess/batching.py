"""Concatenating preprocessed images into batches that fit in memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PATCHES_PER_BATCH = 32_768
"""Patches of one forward pass: the activations of a 7B model's tower then stay below 2 GB in bf16."""


def batches(items: Iterable[tuple[Tensor, Tensor]], max_patches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Concatenate consecutive items into batches of at most `max_patches` patches, or of one larger item.

    Args:
        items: pairs `(pixel_values [patches, values], grid_thw [items, 3])`, drawn one at a time.
        max_patches: most rows of `pixel_values` in a batch of several items.

    Yields:
        `(pixel_values [patches, values], grid_thw [items, 3])` of each batch.
    """
    pending: list[tuple[Tensor, Tensor]] = []
    patches = 0
    for item in items:
        if pending and patches + len(item[0]) > max_patches:
            yield _concatenate(pending)
            pending, patches = [], 0
        pending.append(item)
        patches += len(item[0])
    if pending:
        yield _concatenate(pending)


def _concatenate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(items) == 1:
        return items[0]
    return torch.cat([pixels for pixels, _ in items]), torch.cat([grid for _, grid in items])
