"""Detect moved weights: CUDA graphs read fixed addresses, and modules are easily moved or converted."""

from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn


class WeightGuard:
    """Watches where the parameters of a module are stored, and whether the module has forward hooks.

    The guard lists all parameters when it is made, since walking the modules at every call takes five times as long
    (TUNING.md). It keeps their memory allocated, so that no later parameter can get the same address.

    Attributes:
        parameters: the module's parameters when the guard was made.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._submodules = _DictEntries((part._modules, name) for part in modules for name in part._modules)
        self._parameters = _DictEntries(
            (part._parameters, name) for part in modules for name, x in part._parameters.items() if x is not None
        )
        self.parameters = self._parameters.values
        self._hooks = [hooks for part in modules for hooks in (part._forward_pre_hooks, part._forward_hooks)]
        self._first_snapshot = self._snapshot()
        self.retain_memory()

    def on_gpu(self) -> bool:
        """Whether the first parameter is on a GPU: the one that the module has now in place of the first it had."""
        first = self._parameters.current(0)
        return first is not None and bool(first.is_cuda)

    def retain_memory(self) -> None:
        """Keep the memory of the parameters allocated, even if they move elsewhere."""
        self._memory = [parameter.detach() for parameter in self.parameters]

    def release_memory(self) -> None:
        """Stop keeping the memory of the parameters allocated."""
        self._memory = []

    def weights_unmoved(self) -> bool:
        """Whether the module has the same submodules and parameters, at the same addresses and of the same dtypes."""
        same_objects = self._submodules.are_same_objects() and self._parameters.are_same_objects()
        return same_objects and self._snapshot() == self._first_snapshot

    def refuse_hooks(self) -> None:
        """Raise ValueError if the module or a submodule has forward hooks: a replayed graph does not call them."""
        if any(self._hooks):
            raise ValueError(
                "tower: expected no forward hooks, which CUDA graphs leave out; use impl='reference', or "
                "call enc.tower(pixel_values, GridPlan.build(grid_thw, enc.config, enc.device))"
            )

    def _snapshot(self) -> tuple[list[int], list[object]]:
        """Return the addresses and dtypes of the parameters."""
        return list(map(Tensor.data_ptr, self.parameters)), list(map(attrgetter("dtype"), self.parameters))


class _DictEntries:
    """Entries of dictionaries, and the objects that they had when this was made."""

    def __init__(self, entries: Iterable[tuple[dict[str, Any], str]]) -> None:
        self._dicts, self._names = (list(column) for column in zip(*entries, strict=True))
        self.values: list[Any] = list(map(dict.get, self._dicts, self._names))

    def current(self, index: int) -> Any:
        return self._dicts[index].get(self._names[index])

    def are_same_objects(self) -> bool:
        return all(map(is_, map(dict.get, self._dicts, self._names), self.values))
