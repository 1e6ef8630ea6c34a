"""The hidden states of a tower, layer by layer, with nothing computed beyond the deepest layer asked for."""

from collections.abc import Callable, Collection, Iterator
from itertools import chain

from torch import Tensor

from qwenvit.plan.grid_plan import DevicePlan, GridPlan
from qwenvit.towers.choose import Tower
from qwenvit.towers.fast import FastTower, refuse_gradients


def iter_hidden_states(
    tower: Tower, x: Tensor, plan: GridPlan | DevicePlan, layers: Collection[int]
) -> Iterator[Tensor]:
    """Yield hidden states, the shallowest first.

    Args:
        tower: the tower.
        x: the first block's input, `[patches, hidden_size]`, from `tower.embed`. The fast tower overwrites it.
        plan: the plan of the same patches' grids, on the tower's device.
        layers: which; 0 is the first block's input, k the output of the k-th block.

    Yields:
        `[patches, hidden_size]` in the tower's order. In the fast tower the next layer overwrites it: copy it first.
    """
    apply_block: Callable[..., Tensor] = tower.apply_block
    for layer in range(max(layers) + 1):
        if layer:
            x = apply_block(layer - 1, x, plan)
        if layer in layers:
            yield x


def ordered_hidden_states(
    tower: Tower, pixel_values: Tensor, plan: GridPlan | DevicePlan, layers: Collection[int], order: Tensor
) -> list[Tensor]:
    """Return hidden states in another order of patches, the shallowest first.

    Args:
        tower: the tower.
        pixel_values: `[patches, C·T·P·P]` on the tower's device.
        plan: the plan of the same patches' grids, on the tower's device.
        layers: which, as in `iter_hidden_states`.
        order: `[patches]` int64 on the tower's device, such as `qwenvit.plan.reading_order.reading_order`.

    Returns:
        `[patches, hidden_size]` in the tower's dtype for each of the layers, in new memory.

    Raises:
        ValueError: gradients are requested of the fast tower.
    """
    if isinstance(tower, FastTower):
        refuse_gradients(chain([pixel_values], tower.parameters()))
    embed: Callable[..., Tensor] = tower.embed
    x = embed(pixel_values, plan)
    return [state.index_select(0, order) for state in iter_hidden_states(tower, x, plan, layers)]
