"""Modules whose weights have the kernels' layout in memory, and the checkpoint's layout in state dicts."""

from contextlib import suppress
from typing import Any

from torch import Tensor, nn


class Packed(nn.Module):
    """A module that packs its tensors in `load_state_dict` and unpacks them in `state_dict`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_pack_before_loading)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_unpack_state_dict)  # type: ignore[no-untyped-call]

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn tensors of the reference tower's names and shapes into this module's.

        Raises:
            KeyError: a tensor is missing.
        """
        raise NotImplementedError

    def unpack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo `pack`: turn this module's tensors into the reference tower's names and shapes."""
        raise NotImplementedError


def _pop_prefixed(state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): state_dict.pop(name) for name in [*state_dict] if name.startswith(prefix)}


def _pack_before_loading(module: Packed, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    tensors = _pop_prefixed(state_dict, prefix)
    with suppress(KeyError):  # load_state_dict reports missing tensors
        tensors = module.pack(tensors)
    state_dict |= {prefix + name: tensor for name, tensor in tensors.items()}


def _unpack_state_dict(module: Packed, state_dict: dict[str, Any], prefix: str, _: object) -> None:
    tensors = module.unpack(_pop_prefixed(state_dict, prefix))
    state_dict |= {prefix + name: tensor for name, tensor in tensors.items()}
