"""Grouping prepared images into batches that fit in memory."""

import math
from collections.abc import Iterable, Iterator

from qwenvit.preprocess.prefetch import WAITING, Prefetched
from qwenvit.preprocess.prepared import Prepared

PATCHES_PER_BATCH = 32_768
"""Patches of one forward pass: the activations of a 7B model's tower then stay below 2 GB in bf16."""
PATCHES_PER_VIDEO_BATCH = PATCHES_PER_BATCH // 4
"""Patches of a forward pass of a video on a GPU: the first starts when so many are copied from the host."""
IMAGES_PER_BATCH = PATCHES_PER_BATCH // 4
"""Most images of a batch."""
FAILED_PER_BATCH = 256
"""Most failed images of a batch. They have no patches, and whoever asked waits for their reasons."""
BYTES_PER_BATCH = 512 * 2**20
"""Most memory of a batch's decoded images: photographs may be large and their patches few."""


def batches(
    images: Iterable[Prefetched[Prepared]], max_patches: int, max_bytes: int
) -> Iterator[list[Prefetched[Prepared]]]:
    """Group consecutive images into batches of at most `max_patches` patches and `max_bytes`, or of one larger image.

    The groups depend on the images alone, not on when they were ready, unless `images` has `WAITING` in it: there a
    group ends, and an empty one follows. A failed image takes no room, but counts towards `IMAGES_PER_BATCH` and
    `FAILED_PER_BATCH`.

    Args:
        images: drawn one at a time.
        max_patches: most patches in a batch of several images.
        max_bytes: most bytes of decoded images in a batch of several.
    """
    batch: list[Prefetched[Prepared]] = []
    patches = num_bytes = failed = 0
    for image in images:
        if image is WAITING:
            if batch:
                yield batch
            yield []
            batch, patches, num_bytes, failed = [], 0, 0, 0
            continue
        more_patches = more_bytes = 0
        if image.result is not None:
            more_patches, more_bytes = math.prod(image.result.grid), image.result.num_bytes
        too_large = patches + more_patches > max_patches or num_bytes + more_bytes > max_bytes
        if (more_patches and patches and too_large) or len(batch) == IMAGES_PER_BATCH or failed == FAILED_PER_BATCH:
            yield batch
            batch, patches, num_bytes, failed = [], 0, 0, 0
        batch.append(image)
        failed += image.result is None
        patches, num_bytes = patches + more_patches, num_bytes + more_bytes
    if batch:
        yield batch
