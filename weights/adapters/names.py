"""Names of tensors in LoRA adapters, and in checkpoints saved with an adapter that is not merged.

peft puts `base_model.model.` before the module's path and `lora_A.weight` behind it. The modules that it wraps keep
their own tensors below `base_layer` or `original_module`, and trained copies below `modules_to_save`. In a checkpoint,
the adapter's name comes in between: `lora_A.default.weight`, `modules_to_save.default.weight`.
"""

import re
from dataclasses import dataclass

from qwenvit.weights.names import ALL_MODULES, TOP_MODULES

# Longest first: a regular expression takes the first alternative that matches.
_MODULE = re.compile(
    r"(?:^|\.)("
    + "|".join(
        re.escape(module).replace(r"\.N\.", r"\.[0-9]+\.") for module in sorted(ALL_MODULES, key=len, reverse=True)
    )
    + r")(?=\.)"
)
_WRAPPER = re.compile(
    r"(?:(?<=^)|(?<=\.))(?:base_layer|original_module|modules_to_save(?:\.(?!(?:weight|bias)$)([^.]+))?)\."
)
_LORA = re.compile(r"(lora_[AB])(?:\.([^.]+))?(\.(?:weight|bias))|(lora_embedding_[AB])(?:\.([^.]+))?")


@dataclass(frozen=True)
class AdapterTensor:
    """What the name of a tensor in an adapter says."""

    name: str
    """The name in the file."""
    prefix: str
    """What comes before the tower's own names, such as `"base_model.model.model.visual."`."""
    module: str
    """The tower's module that it changes, by its official name: `"blocks.0.attn.qkv"`."""
    part: str
    """`"lora_A.weight"`, `"lora_B.weight"`, `"lora_B.bias"`, `"lora_embedding_A"`, `"lora_embedding_B"`, or `"weight"`
    and `"bias"` for a tensor that replaces the base's; anything else is unknown."""
    adapter: str | None
    """The adapter's name, where the tensor's name has it."""
    is_original: bool
    """Whether it is the base's own tensor, below `original_module`, which `modules_to_save` replaces."""


def parse_adapter_name(name: str) -> AdapterTensor | None:
    """Return what the name of a tensor in an adapter says; None if the tensor is for no module of any vision tower."""
    found = _MODULE.search(_WRAPPER.sub("", name))
    if found is None:
        return None
    part, adapter = found.string[found.end() + 1 :], None
    if lora := _LORA.fullmatch(part):
        part, adapter = (lora[1] or lora[4]) + (lora[3] or ""), lora[2] or lora[5]
    wrappers = list(_WRAPPER.finditer(name))
    adapter = next((wrapper[1] for wrapper in wrappers if wrapper[1]), adapter)
    is_original = any(wrapper[0] == "original_module." for wrapper in wrappers)
    return AdapterTensor(name, found.string[: found.start(1)], found[1], part, adapter, is_original)


def looks_like_tower(name: str) -> bool:
    """Return whether a name that `parse_adapter_name` does not understand may still be a vision tower's."""
    return not TOP_MODULES.isdisjoint(parts := name.split(".")) or "visual" in parts


def is_adapter_name(name: str) -> bool:
    """Return whether a tensor of a checkpoint, by its name, is an adapter's and not the base's."""
    return re.search(r"(^|\.)(lora_\w+|modules_to_save)\.", f"{name}.") is not None


def plain_name(name: str) -> str:
    """Return the name that a base's tensor has without an adapter: `….base_layer.weight` becomes `….weight`."""
    return re.sub(r"(^|\.)(?:base_layer|original_module)\.", r"\1", name)
