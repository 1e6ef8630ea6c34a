"""Find the vision config inside a config.json by its content, wherever a model nests it."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qwenvit.config.families import FAMILY_OF_MODEL_TYPE, UnknownModelType
from qwenvit.config.hf_defaults import DEFAULTS, OTHER_SPELLINGS
from qwenvit.config.limits import shown

MAX_DEPTH = 5
"""How many mappings deep the search goes. `vlm_config.thinker_config.vision_config` is three deep."""
_VISION_KEYS = frozenset(
    (
        *("depth", "embed_dim", "mlp_ratio", "num_heads", "in_channels", "in_chans", "out_hidden_size"),
        *("patch_size", "spatial_patch_size", "temporal_patch_size", "spatial_merge_size", "tokens_per_second"),
        *("window_size", "fullatt_block_indexes", "num_position_embeddings", "deepstack_visual_indexes"),
    )
)
_LANGUAGE_KEYS = frozenset(("vocab_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"))
_PROCESSOR_KEYS = frozenset(("merge_size", "image_mean"))


@dataclass(frozen=True, eq=False)
class Part:
    """A mapping inside a config.json, and how it is nested."""

    key: str
    """The key of this mapping in the one around it; empty for the whole config."""
    values: Mapping[str, Any]
    parents: tuple["Part", ...] = ()
    """The mappings around this one, outermost first."""

    @property
    def model_type(self) -> str | None:
        """The `model_type` that this mapping states itself; None if it states none that is a string."""
        value = self.values.get("model_type")
        return value if isinstance(value, str) and value else None

    @property
    def known_types(self) -> list[str]:
        """The model types of families, of this mapping and those around it, innermost first."""
        types = [part.model_type for part in (self, *reversed(self.parents))]
        return [model_type for model_type in types if model_type in FAMILY_OF_MODEL_TYPE]

    @property
    def families(self) -> set[str]:
        """The families that `known_types` name."""
        return {FAMILY_OF_MODEL_TYPE[model_type] for model_type in self.known_types}

    def __str__(self) -> str:
        path = ".".join(part.key for part in (*self.parents, self)[1:])
        return shown(path) if path else "the whole config"


def find_vision_config(config: Mapping[str, Any], family: str | None = None) -> Part:
    """Return the vision config that `config` contains, at most `MAX_DEPTH` mappings deep, or is itself.

    In the order of preference: a mapping under the key `vision_config` or with the `model_type` of a vision config; one
    with the content of a vision config; the empty vision config of a model with a known `model_type`, for which
    transformers takes all defaults. Among several, those of `family` come first, then those of any known family, then
    those that state no unknown `model_type` of their own.

    Args:
        config: a parsed config.json.
        family: the tower's family if the caller knows it; `config` is then the vision config itself if it contains none
            and has a key of that family's vision configs, or is empty.

    Raises:
        UnknownModelType: there is no vision config and no known `model_type`, and `family` is None.
        ValueError: there are several different vision configs, or none of `family`, or a nested config is no mapping.
    """
    parts = _all_parts(config)
    found = (
        _innermost(parts, _is_named_vision_config)
        or _innermost(parts, _has_vision_content)
        or [_left_out(part) for part in parts if part.model_type in FAMILY_OF_MODEL_TYPE]
    )
    if not found:
        if family is None:
            raise UnknownModelType(f"config: no vision config and {type_message(parts[0])}")
        if not _may_be_vision_config(parts[0], family):
            raise ValueError(f"config: expected a {family} vision config, got none among {shown(list(config))}")
        found = parts[:1]
    found = [part for part in found if family in part.families] or found
    found = [part for part in found if part.families] or found
    found = [part for part in found if part.model_type is None or part.model_type in FAMILY_OF_MODEL_TYPE] or found
    for part in found[1:]:
        if not _equal(part, found[0]):
            raise ValueError(f"config: expected one vision config, got two different ones, {found[0]} and {part}")
    return found[0]


def type_message(part: Part) -> str:
    """Return what an error says about a `model_type` that is missing or unknown."""
    stated = [model_type for around in (part, *reversed(part.parents)) if (model_type := around.model_type)]
    found = f"unknown model_type {shown(stated[0])}" if stated else "no model_type"
    return f"{found}, expected one of {sorted(FAMILY_OF_MODEL_TYPE)}"


def _all_parts(config: Mapping[str, Any]) -> list[Part]:
    """Return the mappings of a config, itself first, then by depth; each once, whatever contains it."""
    parts = []
    seen = {id(config)}
    waiting = deque([Part("", config)])
    while waiting:
        part = waiting.popleft()
        parts.append(part)
        if len(part.parents) == MAX_DEPTH:
            continue
        for key, value in part.values.items():
            if isinstance(value, Mapping) and isinstance(key, str) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(Part(key, value, (*part.parents, part)))
            elif key == "vision_config" and not isinstance(value, Mapping | None):
                raise ValueError(f"config: vision_config should be a mapping, got {shown(value)}")
    return parts


def _innermost(parts: Iterable[Part], condition: Callable[[Part], bool]) -> list[Part]:
    """Return the parts that meet a condition, without those around another of them that state nothing themselves."""
    found = [part for part in parts if condition(part)]
    around = {id(parent) for part in found for parent in part.parents}
    return [part for part in found if id(part) not in around or part.values.keys() & _VISION_KEYS]


def _is_named_vision_config(part: Part) -> bool:
    is_vision_class = part.model_type in FAMILY_OF_MODEL_TYPE and "_vision" in str(part.model_type)
    return part.key == "vision_config" or is_vision_class


def _has_vision_content(part: Part) -> bool:
    """Return whether a mapping has two of a vision config's keys, or one beside a known `model_type`."""
    keys = part.values.keys()
    needed = 1 if part.model_type in FAMILY_OF_MODEL_TYPE else 2
    return len(keys & _VISION_KEYS) >= needed and not keys & (_LANGUAGE_KEYS | _PROCESSOR_KEYS)


def _may_be_vision_config(part: Part, family: str) -> bool:
    """Return whether a mapping is empty or has a key of the family's vision configs, and none of a language model's."""
    keys = part.values.keys()
    vision = {*DEFAULTS[family], *OTHER_SPELLINGS.values(), "rope_theta", "rope_parameters"}
    return not keys or bool(keys & vision and not keys & _LANGUAGE_KEYS)


def _left_out(model: Part) -> Part:
    """Return the empty vision config of a model that states none, or raise ValueError if a nested config is damaged."""
    for key, value in model.values.items():
        if isinstance(key, str) and key.endswith("_config") and not isinstance(value, Mapping | None):
            raise ValueError(f"config: {shown(key)} should be a mapping, got {shown(value)}")
    return Part("vision_config", {}, (*model.parents, model))


def _equal(one: Part, other: Part) -> bool:
    def values(part: Part) -> dict[str, Any]:
        return {key: value for key, value in part.values.items() if key != "model_type"}

    try:
        return one.families == other.families and values(one) == values(other)
    except RecursionError:  # lists nested thousands deep; no vision config has any
        return False
