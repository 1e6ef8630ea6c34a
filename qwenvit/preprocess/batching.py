"""Packing images one after another into batches that fit in memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PATCHES_PER_BATCH = 32_768
"""Patches that go through the tower at once: the activations of a 7B model's tower then stay below 2 GB in bf16."""


def batches(items: Iterable[tuple[Tensor, Tensor]], most_patches: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Join consecutive items, as many as `most_patches` allows and at least one.

    Args:
        items: `(pixel_values [patches, values], grid_thw [items, 3])` each; drawn one at a time.
        most_patches: rows of `pixel_values` in one batch.

    Yields:
        The same pairs, joined.
    """
    pending: list[tuple[Tensor, Tensor]] = []
    patches = 0
    for item in items:
        if pending and patches + len(item[0]) > most_patches:
            yield _join(pending)
            pending, patches = [], 0
        pending.append(item)
        patches += len(item[0])
    if pending:
        yield _join(pending)


def _join(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(items) == 1:
        return items[0]
    return torch.cat([pixels for pixels, _ in items]), torch.cat([grid for _, grid in items])
