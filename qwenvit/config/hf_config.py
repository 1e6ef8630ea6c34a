"""Reading a Hugging Face `config.json` into the fields of `VisionConfig`, whichever spellings it uses."""

import math
from collections.abc import Mapping
from typing import Any

from qwenvit.config.families import FAMILIES, FAMILY_OF_MODEL_TYPE


def family_of(config: Mapping[str, Any]) -> str:
    """Return the family of a config.json, from its own and its vision config's `model_type`.

    Raises:
        ValueError: `model_type` is missing or unknown, or the two name different families.
    """
    vision = _vision_part(config)
    types = [part["model_type"] for part in (vision, config) if part.get("model_type")]
    if not types:
        raise ValueError(f"config: no model_type, expected one of {sorted(FAMILY_OF_MODEL_TYPE)}")
    if unknown := [t for t in types if t not in FAMILY_OF_MODEL_TYPE]:
        raise ValueError(f"config: unknown model_type {unknown[0]!r}, expected one of {sorted(FAMILY_OF_MODEL_TYPE)}")
    families = {FAMILY_OF_MODEL_TYPE[t] for t in types}
    if len(families) > 1:
        raise ValueError(f"config: model_type {types[1]!r} has a vision_config of another family, {types[0]!r}")
    return families.pop()


def _vision_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the vision config inside a composite config, or `config` if it is a vision config already."""
    for key in ("thinker_config", "vision_config"):
        if key in config:
            if not isinstance(config[key], Mapping):
                raise ValueError(f"config: {key} should be a mapping, got {config[key]!r}")
            config = config[key]
    return config


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `VisionConfig` from a config.json, with transformers' defaults for missing keys.

    Raises:
        ValueError: the family is unknown, a key without a default is missing, or values contradict each other.
    """
    family = family_of(config)
    traits = FAMILIES[family]
    vision = _vision_part(config)

    def read(*spellings: str, default: Any = None) -> Any:
        """Return the value of a key under any of its spellings."""
        found = {name: vision[name] for name in spellings if vision.get(name) is not None}
        if len({repr(value) for value in found.values()}) > 1:
            raise ValueError(f"config: two spellings of one value disagree: {found}")
        value = next(iter(found.values()), default)
        if value is None:
            raise ValueError(f"config: {' / '.join(spellings)} is missing from the {family} vision config")
        return value

    width_is_embed_dim = family == "qwen2_vl"  # its `hidden_size` is the output width
    hidden_size = positive_integer("embed_dim", read("embed_dim")) if width_is_embed_dim else read("hidden_size")
    if width_is_embed_dim and vision.get("intermediate_size") is None:
        ratio = read("mlp_ratio", default=4)
        if not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
            raise ValueError(f"config: mlp_ratio should be a positive number, got {ratio!r}")
        intermediate_size = int(hidden_size * ratio)
    else:
        intermediate_size = read("intermediate_size")
    if vision.get("apply_vit_abs_pos_embed") is False:
        raise ValueError("config: apply_vit_abs_pos_embed=False: a tower without its position table is unsupported")
    return {
        "family": family,
        "depth": read("depth", "num_hidden_layers"),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_heads": read("num_heads", "num_attention_heads"),
        "out_hidden_size": read("hidden_size") if width_is_embed_dim else read("out_hidden_size"),
        "hidden_act": read("hidden_act", default=traits.hidden_act),
        "patch_size": read("patch_size", "spatial_patch_size", default=16 if traits.learned_positions else 14),
        "temporal_patch_size": read("temporal_patch_size", default=2),
        "spatial_merge_size": read("spatial_merge_size", default=2),
        "in_channels": read("in_channels", "in_chans", default=3),
        "rope_theta": _rope_theta(vision),
        "window_size": read("window_size", default=112) if traits.windowed else None,
        "fullatt_block_indexes": tuple(read("fullatt_block_indexes", default=(7, 15, 23, 31)))
        if traits.windowed
        else (),
        "num_position_embeddings": read("num_position_embeddings", default=2304) if traits.learned_positions else None,
        "deepstack_visual_indexes": tuple(read("deepstack_visual_indexes", default=(8, 16, 24)))
        if traits.deepstack
        else _refuse_if_present(vision, "deepstack_visual_indexes", family),
        "tokens_per_second": vision.get("tokens_per_second", 4 if family == "qwen2_5_vl" else None)
        if traits.windowed
        else None,
    }


def _rope_theta(vision: Mapping[str, Any]) -> float:
    """Return the base of RoPE's frequencies, which transformers moved into `rope_parameters`."""
    rope = vision.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config: rope_parameters should be a mapping, got {rope!r}")
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise ValueError(f"config: rope_type {rope['rope_type']!r} is not supported, expected 'axial'")
    values = [part["rope_theta"] for part in (rope, vision) if part.get("rope_theta") is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise ValueError(f"config: rope_theta is {values[0]!r} in rope_parameters and {values[1]!r} beside it")
    return values[0] if values else 10000.0


def _refuse_if_present(vision: Mapping[str, Any], key: str, family: str) -> tuple[()]:
    """Return an empty tuple, or raise ValueError if the config states a key that the family does not have."""
    if vision.get(key):
        raise ValueError(f"config: {key}={vision[key]} in a {family} config, whose towers have none")
    return ()


def positive_integer(name: str, value: object) -> int:
    """Return `value`, or raise ValueError with its name unless it is an integer above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return value
