"""Load single tensors of a checkpoint into a tower that has its weights packed."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qwenvit.towers.choose import Tower
from qwenvit.towers.packed import Packed
from qwenvit.towers.shapes import weight_shapes
from qwenvit.weights.names import canonical_name, official_name


@dataclass
class _Part:
    """A module of the tower whose tensors are loaded together: a packed one, or a plain layer."""

    prefix: str
    """What the names of its tensors start with in the tower."""
    module: nn.Module
    missing: set[str] = field(default_factory=set)
    """Canonical names of the tensors that never came."""


class WeightLoader:
    """Copies tensors, one at a time, into the parameters of a tower, which keep their addresses.

    A packed parameter has rows of several of a checkpoint's tensors. To load one of these, its module's tensors are
    unpacked, this one replaced, and all packed again: a copy of one layer is the largest that is ever made.

    Args:
        tower: the tower, whose parameters are in memory.
    """

    def __init__(self, tower: Tower) -> None:
        self._tower = tower
        self._shapes = weight_shapes(tower.config)
        self._parts: dict[str, _Part] = {}
        for name in self._shapes:
            self._part_of(name).missing.add(name)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by official name.

        Returns:
            The names, in the tower, of all parameters that nothing is missing of, after this call and those before.

        Raises:
            ValueError: a name that the tower does not have, or another shape; tensors before it are loaded.
        """
        for official, tensor in weights:
            self._load(official, tensor)
        return {
            part.prefix + name
            for part in self._parts.values()
            if not part.missing
            for name, _ in part.module.named_parameters()
        }

    @torch.no_grad()
    def _load(self, official: str, tensor: Tensor) -> None:
        family = self._tower.config.family
        try:
            name = canonical_name(official, family)
        except ValueError:
            name = ""
        if name not in self._shapes:
            example = official_name(next(iter(self._shapes)), family)
            raise ValueError(f"weights: expected tensors of a {family} tower, such as {example!r}, got {official!r}")
        if tensor.shape != self._shapes[name]:
            raise ValueError(
                f"weights: {official}: expected shape {list(self._shapes[name])}, got {list(tensor.shape)}"
            )
        part = self._part_of(name)
        tensors = part.module.state_dict()
        place = tensors[name.removeprefix(part.prefix)]
        tensors[name.removeprefix(part.prefix)] = tensor.to(place.device, place.dtype)
        part.module.load_state_dict(tensors)
        part.missing.discard(name)

    def _part_of(self, name: str) -> _Part:
        """Return the part that a tensor belongs to: the outermost packed module, or else the module that has it."""
        module: nn.Module = self._tower
        rest = name
        while not isinstance(module, Packed) and "." in rest:
            child, _, rest = rest.partition(".")
            module = module.get_submodule(child)
        prefix = name.removesuffix(rest)
        return self._parts.setdefault(prefix, _Part(prefix, module))
