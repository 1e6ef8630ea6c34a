"""Maps of hidden states: which are asked for, and how they are cut out of a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from torch import Tensor

from qwenvit.arguments import check_indices
from qwenvit.config.vision_config import VisionConfig
from qwenvit.towers.choose import Tower

Cells = Literal["patches", "tokens"]
"""What a cell of a map is: a patch, or the mean of the patches of a merged token."""


@dataclass(frozen=True)
class ItemFeatures:
    """Maps of one image or video, a map for each layer asked for."""

    maps: tuple[Tensor, ...]
    """`[h, w, hidden_size]` of an image or `[t, h, w, hidden_size]` of a video for each layer, in the order asked for;
    in reading order, on the tower's device and in its dtype. They are views of their batch: to keep few of many, copy
    them."""
    layers: tuple[int, ...]
    """The layers, 0 to `depth`: 0 is the first block's input, k the output of the k-th block."""
    grid: tuple[int, int, int]
    """Frame groups, rows and columns of the maps."""
    is_video: bool = False
    """Whether the input was a video, even one of a single frame group."""

    def cpu(self) -> Self:
        """Return a copy on the CPU, which keeps nothing of the batch that this is a view of."""
        return replace(self, maps=tuple(one.detach().to("cpu", copy=True) for one in self.maps))

    def __repr__(self) -> str:
        shape = list(self.maps[0].shape)
        return f"ItemFeatures(layers {', '.join(map(str, self.layers))}; {shape} {self.maps[0].dtype} each)"


def check_layers(layers: Iterable[int], depth: int) -> tuple[int, ...]:
    """Return layers counted from 0 to `depth`, in the same order.

    Args:
        layers: at least one integer. 0 is the first block's input, k the output of the k-th block; negative ones count
            from the end, so that -1 is the last block's output.
        depth: the number of blocks.

    Raises:
        TypeError: no integers in an order.
        ValueError: no layer, or one that the tower does not have.
    """
    return check_indices("layers", layers, depth + 1)


@dataclass(frozen=True)
class MapRequest:
    """The maps that a caller asks for."""

    layers: tuple[int, ...]
    """0 to `depth`, in the order asked for; a layer may be asked for twice."""
    by_token: bool
    """Whether a cell is the mean of a merged token's patches, rather than a patch."""
    norm: bool
    """Whether each patch goes through the final merger's norm first."""

    @classmethod
    def check(cls, layers: Iterable[int], what: Cells, norm: bool, config: VisionConfig) -> Self:
        """Check the arguments of `Encoder.features`.

        Raises:
            TypeError: layers that are no integers.
            ValueError: layers that the tower does not have, or an unknown `what`.
        """
        if what not in get_args(Cells):
            raise ValueError(f"what: expected 'patches' or 'tokens', got {what!r}")
        return cls(check_layers(layers, config.depth), what == "tokens", norm)

    @property
    def computed(self) -> tuple[int, ...]:
        """Each of the layers once, the shallowest first."""
        return tuple(sorted(set(self.layers)))

    def cells(self, states: Sequence[Tensor], tower: Tower) -> list[Tensor]:
        """Turn hidden states into the cells of maps.

        Every operation works on one patch or on the patches of one token, so that a cell's bits depend on its item.

        Args:
            states: `[patches, hidden_size]` for each of `computed`, in the order of
                `qwenvit.plan.reading_order.reading_order` with this `by_token`.
            tower: the tower that computed them.

        Returns:
            `[cells, hidden_size]` for each of `computed`, in reading order and the states' dtype.
        """
        found = []
        for state in states:
            patches = tower.merger.norm(state) if self.norm else state
            found.append(_mean_of_tokens(patches, tower.config.merge_unit) if self.by_token else patches)
        return found

    def items(
        self, cells: Sequence[Tensor], grids: Sequence[Sequence[int]], config: VisionConfig, is_video: bool = False
    ) -> list[ItemFeatures]:
        """Cut the maps of each item out of those of a batch.

        Args:
            cells: `[cells, hidden_size]` for each of `computed`: what `cells` returned.
            grids: frame groups, rows and columns of *patches* of each item.
            config: the tower's config.
            is_video: whether all items are videos; those of several frame groups are in any case.
        """
        merge = config.spatial_merge_size if self.by_token else 1
        found, start = [], 0
        of_layer = dict(zip(self.computed, cells, strict=True))
        for frames, rows, columns in grids:
            grid = (frames, rows // merge, columns // merge)
            end = start + grid[0] * grid[1] * grid[2]
            video = is_video or frames > 1
            shape = grid if video else grid[1:]
            maps = {layer: of_all[start:end].unflatten(0, shape) for layer, of_all in of_layer.items()}
            found.append(ItemFeatures(tuple(maps[layer] for layer in self.layers), self.layers, grid, video))
            start = end
        return found


def _mean_of_tokens(patches: Tensor, merge_unit: int) -> Tensor:
    """Average the neighbouring `merge_unit` patches of each token, added in fp32 one after another."""
    total, *others = patches.unflatten(0, (-1, merge_unit)).unbind(1)
    total = total.float()
    for other in others:
        total = total + other.float()
    return (total / merge_unit).to(patches.dtype)
