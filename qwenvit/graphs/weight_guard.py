"""Whether a module's weights are where they were: CUDA graphs hold addresses, and modules are easily moved."""

from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn


class WeightGuard:
    """The parameters of a module, where they lay when this was made, and whether anybody hooks on to it.

    Walking the modules of a tower takes half a millisecond, a fifth of a small image's time on the GPU. So the places
    are listed once, and looking them through takes a fifth of that. Memory that is watched stays allocated, so that no
    other parameter comes to lie there.

    Attributes:
        parameters: of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._modules = _Entries((part._modules, name) for part in modules for name in part._modules)
        places = ((part._parameters, name) for part in modules for name, x in part._parameters.items() if x is not None)
        self._parameters = _Entries(places)
        self.parameters = self._parameters.found
        self._hooks = [hooks for part in modules for hooks in (part._forward_pre_hooks, part._forward_hooks)]
        self._lying = self._snapshot()
        self.hold()

    def hold(self) -> None:
        """Keep the memory allocated in which the parameters lie."""
        self._memory = [parameter.detach() for parameter in self.parameters]

    def release(self) -> None:
        """Keep it no longer."""
        self._memory = []

    def unchanged(self) -> bool:
        """Whether it has the same submodules and parameters still, at the same addresses and of the same dtypes."""
        return self._modules.unchanged() and self._parameters.unchanged() and self._snapshot() == self._lying

    def refuse_hooks(self) -> None:
        """ValueError where the module or a part of it has forward hooks: graphs run them at their capture alone."""
        if any(self._hooks):
            raise ValueError(
                "tower: expected no forward hooks, which CUDA graphs leave out; use impl='reference', or "
                "call enc.tower(pixel_values, GridPlan.build(grid_thw, enc.config, enc.device))"
            )

    def _snapshot(self) -> tuple[list[int], list[object]]:
        return list(map(Tensor.data_ptr, self.parameters)), list(map(attrgetter("dtype"), self.parameters))


class _Entries:
    """Entries of dictionaries, and what they were."""

    def __init__(self, entries: Iterable[tuple[dict[str, Any], str]]) -> None:
        self._holders, self._names = (list(column) for column in zip(*entries, strict=True))
        self.found: list[Any] = list(map(dict.get, self._holders, self._names))

    def unchanged(self) -> bool:
        return all(map(is_, map(dict.get, self._holders, self._names), self.found))
