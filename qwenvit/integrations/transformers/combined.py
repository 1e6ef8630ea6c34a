"""Replace all that qwenvit computes in a loaded transformers model."""

from torch import nn

from qwenvit.arguments import Impl
from qwenvit.integrations.transformers.handle import Handle
from qwenvit.integrations.transformers.loaded_tower import find_tower
from qwenvit.integrations.transformers.rope_index import use_rope_index
from qwenvit.integrations.transformers.tower import TowerHandle, use_tower
from qwenvit.mrope.rules import PUBLISHED_RULES


class QwenvitHandle(Handle):
    """Undo `use_qwenvit`: `remove()`, or leaving a `with` block, restores the model's own tower and positions.

    Attributes:
        tower: the handle of the tower.
    """

    def __init__(self, tower: TowerHandle, rope_index: Handle) -> None:
        super().__init__(tower.remove)
        self.tower = tower
        self._rope_index = rope_index

    def remove(self) -> None:
        """Put back the model's own tower and positions; a second call does nothing."""
        try:
            self._rope_index.remove()
        finally:
            super().remove()


def use_qwenvit(model: nn.Module, impl: Impl = "auto", *, free_original: bool = False) -> QwenvitHandle:
    """Make a loaded transformers model use qwenvit's vision tower and M-RoPE positions.

    This is `use_tower(model, impl, free_original=free_original)` and `use_rope_index(model)`, which serves no Omni
    model: for those, call `use_tower` alone.

    Returns:
        A handle whose `remove()` undoes both; also a context manager.

    Raises:
        TypeError, ValueError: one of the two refuses the model, which is unchanged.
    """
    family = find_tower(model)[1].family
    if family not in PUBLISHED_RULES:
        expected = f"a family with positions ({', '.join(PUBLISHED_RULES)})"
        raise ValueError(f"model: expected {expected}, got {family}; call use_tower alone")
    rope_index = use_rope_index(model)
    try:
        return QwenvitHandle(use_tower(model, impl, free_original=free_original), rope_index)
    except BaseException:
        rope_index.remove()
        raise
