"""qwenvit's tower as vLLM's models hold and call one."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qwenvit.graphs.capacity import MAX_GRAPH_PATCHES
from qwenvit.graphs.graphed_tower import GraphedTower, graphs_of
from qwenvit.integrations.vllm.weights import WeightLoader
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.inputs import check_grid, check_pixel_values
from qwenvit.towers.choose import Tower


class VllmTower(nn.Module):
    """The module that takes the place of a model's `visual`.

    vLLM sees the tower's parameters, under names of their own, and not its modules: to reload weights, vLLM moves the
    parameters of all modules that it sees to the meta device, while ours are to keep their addresses, which CUDA graphs
    read.

    Args:
        tower: our tower, on its device, in its dtype; weights are loaded later.
        input_norm: vLLM's module that normalises raw uint8 patches on the device; None in versions without.
        use_graphs: whether a tower that can run in CUDA graphs does.
    """

    def __init__(self, tower: Tower, input_norm: nn.Module | None = None, *, use_graphs: bool = True) -> None:
        super().__init__()
        self._tower = (tower.requires_grad_(False).eval(),)  # in a tuple, so that it is no child module
        self._loader = WeightLoader(tower)
        self._use_graphs = use_graphs
        self.input_norm = input_norm
        self.spatial_merge_size = tower.config.spatial_merge_size
        self.deepstack_visual_indexes = list(tower.config.deepstack_visual_indexes)
        self.out_hidden_size = tower.config.out_hidden_size * (1 + len(self.deepstack_visual_indexes))
        """Columns of the output, as vLLM's towers have it."""
        for name, parameter in tower.named_parameters():
            parameter.weight_loader_numel = 0  # type: ignore[attr-defined]  # vLLM's reload has nothing to load here
            self.register_parameter(_registered(name), parameter)

    @property
    def tower(self) -> Tower:
        """The tower itself."""
        return self._tower[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and outputs."""
        return next(self.tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.tower.parameters()).device

    def forward(
        self, x: Tensor, grid_thw: Tensor | Sequence[Sequence[int]], *, encoder_metadata: object = None
    ) -> Tensor:
        """Encode packed patches as vLLM's towers do.

        Args:
            x: `[patches, C·T·P·P]`, floating or, with `input_norm`, raw uint8.
            grid_thw: `[items, 3]`: frame groups, rows and columns of patches.
            encoder_metadata: what vLLM prepares for graphs of its own; there is none for this tower.

        Returns:
            `[tokens, out_hidden_size]`: the tokens in reading order, joined along the width by DeepStack's features,
            shallowest first.

        Raises:
            ValueError: `encoder_metadata` is given, or the arguments do not fit each other.
        """
        if encoder_metadata is not None:
            raise ValueError(
                "encoder_metadata: expected None, since qwenvit's tower has CUDA graphs of its own, got some"
            )
        x = x.to(self.device)
        if self.input_norm is not None:
            x = self.input_norm(x, self.dtype)
        config = self.tower.config
        grid = check_grid(grid_thw, config.spatial_merge_size)
        check_pixel_values(x, grid, config)
        graphs = self._graphs()
        output = graphs(x, grid) if graphs is not None else self.tower(x, GridPlan.build(grid, config, self.device))
        features = output.deepstack_features
        return torch.cat([output.pooler_output, *features], dim=1) if features else output.pooler_output

    def warm_up(self, patches: int) -> None:
        """Capture the CUDA graphs of images of up to so many patches, if the tower runs in graphs."""
        if (graphs := self._graphs()) is not None:
            graphs.warm_up(min(patches, MAX_GRAPH_PATCHES))

    def _graphs(self) -> GraphedTower | None:
        return graphs_of(self.tower) if self._use_graphs else None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy tensors of a checkpoint into the tower's parameters, in place; any part of them, in any order.

        Args:
            weights: official names without the tower's prefix, and tensors of any floating dtype on any device.

        Returns:
            The names of the parameters that have been loaded completely, in this call and those before.

        Raises:
            ValueError: a name that the tower does not have, or another shape.
        """
        return {_registered(name) for name in self._loader.load(weights)}


def _registered(name: str) -> str:
    """Return the name of a tower's parameter in `VllmTower`: names with dots are those of submodules."""
    return name.replace(".", "_")
