"""Modules that hold their weights in the kernels' layout and exchange them in the checkpoint's."""

from contextlib import suppress
from typing import Any

from torch import Tensor, nn


class Packed(nn.Module):
    """A module whose own tensors are packed as a state dict is loaded, and unpacked as one is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_load_packed)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_give_unpacked)  # type: ignore[no-untyped-call]

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the reference tower's names and shapes to this module's."""
        raise NotImplementedError

    def unpack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `pack`."""
        raise NotImplementedError


def _take(state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): state_dict.pop(name) for name in [*state_dict] if name.startswith(prefix)}


def _load_packed(module: Packed, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    tensors = _take(state_dict, prefix)
    with suppress(KeyError):  # something is missing: load_state_dict says what
        tensors = module.pack(tensors)
    state_dict |= {prefix + name: tensor for name, tensor in tensors.items()}


def _give_unpacked(module: Packed, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    state_dict |= {prefix + name: tensor for name, tensor in module.unpack(_take(state_dict, prefix)).items()}
