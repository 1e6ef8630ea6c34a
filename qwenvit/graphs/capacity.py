"""Capacities of CUDA graphs: sizes rounded up in steps, so that one graph serves many batches."""

from typing import NamedTuple

from torch import Tensor

from qwenvit.config.vision_config import VisionConfig

MAX_GRAPH_PATCHES = 32768
"""Larger batches run without a graph: launches take a small part of their time, and a graph's memory would be large."""
MIN_GRAPH_PATCHES = 320
"""Every graph takes at least this many patches: each matrix product would pad fewer rows by itself, in a copy."""
MIN_POOL_PATCHES = 4096
"""The memory pool is large enough for a graph of at least this many patches."""
MIN_SIDE = 512
"""Every graph has RoPE angles for at least this many rows and columns of patches; larger frames get a power of two."""

SHORT_PASS_PATCHES = 2048
"""Up to this many patches, a pass takes about as long with half as many again."""


class Capacity(NamedTuple):
    """Numbers of patches, frames and so on: those of a batch, or the most that a graph can take.

    A graph can run a batch when each of its numbers is at least the batch's.
    """

    patches: int
    frames: int
    windows: int
    items: int
    side: int
    """Rows or columns of patches, whichever is larger."""


class PreparedGrids(NamedTuple):
    """What `GraphedTower` computes once for the grids of a batch."""

    grid: Tensor
    """`[items, 3]` int64 on the CPU."""
    needed: Capacity
    """The numbers of the batch itself."""
    capacity: Capacity | None
    """The capacity of the smallest graph for the batch; None if it runs without a graph."""
    tables: dict[int, Tensor]
    """By number of items padded to: `device_plan.grid_table` in pinned host memory, made when it is first needed."""


def capacity_for(need: Capacity, merge_unit: int) -> Capacity:
    """Return the capacity of the graph that runs a batch.

    Patches are rounded up to a multiple of 1/32 of the power of two below them, and of at least 16; they are at least
    `MIN_GRAPH_PATCHES`. Other numbers are rounded up to powers of two, starting at what images of ordinary shapes need,
    so that patches alone usually decide.
    A single frame stays a single frame: attention splits one segment best when it knows that there is only one.

    The steps are fine because spare capacity costs more time than its share of the patches: cuBLAS selects another
    kernel for every height (TUNING.md).

    Args:
        need: the numbers of the batch.
        merge_unit: patches of a merged token; the capacity's patches are a multiple of it.
    """
    patches = max(need.patches, MIN_GRAPH_PATCHES)
    step = max(16, next_power_of_two(patches) // 64)
    patches = -(-patches // step) * step
    least = max(8, patches // 1024)
    usual_windows = patches // 64 + patches // 256 + 16
    windows = 0
    if need.windows:  # none in towers without windows
        windows = usual_windows if need.windows <= usual_windows else next_power_of_two(need.windows)
    frames = 1 if need.frames == 1 else next_power_of_two(max(need.frames, least))
    items = 1 if need.items == 1 else next_power_of_two(max(need.items, least))
    side = next_power_of_two(max(need.side, MIN_SIDE))
    return Capacity(-(-patches // merge_unit) * merge_unit, frames, windows, items, side)


def coarse_capacity(capacity: Capacity, merge_unit: int) -> Capacity:
    """Return the capacity of a graph that many sizes share: 4 steps from a power of two to the next, 2 in short passes.

    Args:
        capacity: what `capacity_for` returned.
        merge_unit: patches of a merged token.
    """
    step = next_power_of_two(capacity.patches) // (4 if capacity.patches <= SHORT_PASS_PATCHES else 8)
    return capacity_for(capacity._replace(patches=-(-capacity.patches // step) * step), merge_unit)


def next_power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def single_image_capacity(patches: int, config: VisionConfig) -> Capacity:
    """Return the capacity of the graph that runs one image of ordinary shape."""
    windows = 0 if config.window_size is None else 1
    return capacity_for(Capacity(patches, 1, windows, 1, 1), config.merge_unit)


def pool_patches_for(patches: int, grows: bool = False) -> int:
    """Return the patches of the graph that sizes the memory pool, when a graph of `patches` is needed.

    At least `MIN_POOL_PATCHES`, and otherwise up to an eighth more than `patches`. A pool that grows drops its graphs,
    so it grows to the next power of two: sizes vary, and larger ones may come.
    """
    patches = max(patches, MIN_POOL_PATCHES)
    if grows:
        return next_power_of_two(patches)
    step = next_power_of_two(patches) // 16
    return -(-patches // step) * step
