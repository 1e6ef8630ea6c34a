"""How much room CUDA graphs have: in steps, so that one serves many sizes."""

from typing import NamedTuple

from torch import Tensor

from qwenvit.config.vision_config import VisionConfig

MOST_PATCHES = 32768
"""Larger batches run without a graph: launches are a small part of their time, and buffers would be large."""
LEAST_REACH = 4096
"""Patches of the first and largest graph there is, at least."""
LEAST_SIDE = 512
"""Rows and columns of patches that every graph has angles for; larger frames double it."""


class Capacity(NamedTuple):
    """What there is room for; a capacity covers another when it has as much of everything."""

    patches: int
    frames: int
    windows: int
    items: int
    side: int
    """Most rows or columns of patches."""


class Grids(NamedTuple):
    """Grids made ready: what they need, the room they get, and their table."""

    need: Capacity
    room: Capacity
    """`need` itself where there is no graph."""
    table: Tensor
    """Of `device_plan.grid_table`, in memory that a GPU reads by itself."""


def capacity_for(need: Capacity, merge_unit: int) -> Capacity:
    """The graph's capacity for what some grids need.

    Patches are rounded up to a multiple of a thirty-second of the power of two below (at least 16), other counts to
    powers of two that begin at what images of ordinary shapes need, so that they seldom make a difference. One frame
    stays one: attention divides a single segment best where it knows that it is one.

    Room costs more than its share, since cuBLAS chooses anew for every height: of Qwen3-VL-8B's MLP the two products
    take 14.1 and 19.0 µs at 784 patches, and 17.9 and 22.5 at 832, a sixteenth more (H200, bf16).
    """
    step = max(16, power(need.patches) // 64)
    patches = -(-need.patches // step) * step
    least = max(8, patches // 1024)
    usual = patches // 64 + patches // 256 + 16
    windows = (usual if need.windows <= usual else power(need.windows)) if need.windows else 0
    frames = 1 if need.frames == 1 else power(max(need.frames, least))
    items = 1 if need.items == 1 else power(max(need.items, least))
    return Capacity(-(-patches // merge_unit) * merge_unit, frames, windows, items, power(max(need.side, LEAST_SIDE)))


def power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def single_image_capacity(patches: int, config: VisionConfig) -> Capacity:
    """The graph's capacity for one image of ordinary shape."""
    windows = 0 if config.window_size is None else 1
    return capacity_for(Capacity(patches, 1, windows, 1, 1), config.merge_unit)


def pool_patches_for(patches: int) -> int:
    """Patches of the largest graph, where one of so many is needed: up to an eighth more."""
    patches = max(patches, LEAST_REACH)
    step = power(patches) // 16
    return -(-patches // step) * step
