"""Reading a Hugging Face `config.json` into the fields of `VisionConfig`, whichever spellings it uses."""

from collections.abc import Mapping
from typing import Any

from qwenvit.config.families import FAMILIES, FAMILY_OF_MODEL_TYPE, UnknownModelType
from qwenvit.config.hf_defaults import DEFAULT_ROPE_THETA, DEFAULTS, OTHER_SPELLINGS
from qwenvit.config.limits import LIMITS, positive_integer, shown
from qwenvit.config.nesting import Part, find_vision_config, type_message

_INVISIBLE = ("num_heads", "hidden_act", "window_size", "fullatt_block_indexes", "deepstack_visual_indexes")
"""Keys that change a tower's outputs and not the shapes of its weights."""


def family_of(config: Mapping[str, Any], family: str | None = None) -> str:
    """Return the family of a config.json's tower, from the `model_type` of the vision config or a mapping around it.

    Args:
        config: a parsed config.json.
        family: the family if the caller knows it; then every `model_type` is ignored.

    Raises:
        UnknownModelType: no `model_type` names a family.
        ValueError: two name different families, there is no single vision config, or `family` is unknown.
    """
    return _find(config, family)[1]


def _find(config: Mapping[str, Any], family: str | None) -> tuple[Part, str]:
    """Return the vision config and its family."""
    if family is not None and not (isinstance(family, str) and family in FAMILIES):
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {shown(family)}")
    part = find_vision_config(config, family)
    if family is not None:
        return part, family
    for around in (part, *part.parents):
        if not isinstance(model_type := around.values.get("model_type"), str | None):
            raise ValueError(f"config: expected a string for the model_type of {around}, got {shown(model_type)}")
    if not part.families:
        raise UnknownModelType(f"config: {type_message(part)}")
    if len(part.families) > 1:
        inner, *others = part.known_types
        outer = next(other for other in others if FAMILY_OF_MODEL_TYPE[other] != FAMILY_OF_MODEL_TYPE[inner])
        raise ValueError(f"config: model_type {outer!r} has a vision_config of another family, {inner!r}")
    return part, part.families.pop()


def unstated_choices(config: Mapping[str, Any], family: str) -> list[str]:
    """Return the keys left out of the vision config that neither its tensors' names nor their shapes tell.

    With a known `model_type` they have transformers' defaults. If only the tensors' names tell the family, its defaults
    are a guess. Qwen2-VL's `hidden_act` is not among them: the published config.json files do not state it.

    Raises:
        ValueError: there is no single vision config, or `family` is unknown.
    """
    values = _find(config, family)[0].values
    wanted = [key for key in _INVISIBLE if key in DEFAULTS[family] and (family, key) != ("qwen2_vl", "hidden_act")]
    return [key for key in wanted if key not in values and OTHER_SPELLINGS.get(key) not in values]


def fields_from_hf(config: Mapping[str, Any], family: str | None = None) -> dict[str, Any]:
    """Return the fields of `VisionConfig` from a config.json, with transformers' defaults for keys left out.

    Args:
        config: a parsed config.json.
        family: the family if the caller knows it; then every `model_type` is ignored.

    Raises:
        UnknownModelType: no `model_type` names a family.
        ValueError: there is no single vision config, `family` is unknown, or values contradict each other.
    """
    part, family = _find(config, family)
    values, defaults = part.values, DEFAULTS[family]

    def read(key: str) -> Any:
        """Return the value of a key under either of its spellings."""
        other = OTHER_SPELLINGS.get(key)
        value = values.get(key, values.get(other, defaults[key]) if other else defaults[key])
        if isinstance(value, float) and key == "mlp_ratio" and value.is_integer():  # as transformers 4 took it
            value = int(value)
        if isinstance(defaults[key], int):
            positive_integer(key, value, LIMITS.get(key, LIMITS["hidden_size"]))
        if other and other in values:
            _refuse_disagreement(other, values[other], key, value)
        return value

    fields: dict[str, Any] = {key: read(key) for key in defaults}
    fields |= {"family": family, "rope_theta": _rope_theta(values)}
    for key in fields.keys() & {"fullatt_block_indexes", "deepstack_visual_indexes"}:
        if not isinstance(fields[key], list | tuple):
            raise ValueError(f"{key}: expected a list of block numbers, got {shown(fields[key])}")
        fields[key] = tuple(fields[key])
    if family == "qwen2_vl":  # its `hidden_size` is the output width
        fields |= {"hidden_size": fields.pop("embed_dim"), "out_hidden_size": fields["hidden_size"]}
        fields["intermediate_size"] = fields["hidden_size"] * fields.pop("mlp_ratio")
    if FAMILIES[family].windowed:
        # transformers asks whether a block's number is listed, so numbers of blocks that do not exist have no effect.
        # Small copies of large models have them.
        fields["fullatt_block_indexes"] = tuple(
            number
            for number in fields["fullatt_block_indexes"]
            if not isinstance(number, int) or number < fields["depth"]
        )
    _refuse_contradictions(values, fields)
    return fields


def _refuse_contradictions(values: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raise ValueError for keys that this family's class in transformers does not read and that mean another tower."""
    width, heads = fields["hidden_size"], fields["num_heads"]
    for key, meaning, value in (
        ("in_chans", "in_channels", fields["in_channels"]),
        ("spatial_patch_size", "patch_size", fields["patch_size"]),
        ("intermediate_size", "embed_dim x mlp_ratio", fields["intermediate_size"]),  # in Qwen2-VL
        ("num_key_value_heads", "num_heads", heads),
        ("head_dim", "channels / num_heads", width // heads),
    ):
        if values.get(key) is not None:
            _refuse_disagreement(key, values[key], meaning, value)
    if values.get("apply_vit_abs_pos_embed") is False:
        raise ValueError("config: apply_vit_abs_pos_embed=False: a tower without its position table is unsupported")
    if "deepstack_visual_indexes" not in fields and (indexes := values.get("deepstack_visual_indexes")):
        raise ValueError(
            f"config: deepstack_visual_indexes={shown(indexes)} in a {fields['family']} config, whose towers have none"
        )


def _refuse_disagreement(key: str, stated: object, meaning: str, value: int) -> None:
    """Raise ValueError unless a key states the value of what it means."""
    if positive_integer(key, stated) != value:
        raise ValueError(f"config: two spellings of one value disagree: {key}={stated}, {meaning}={value}")


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """Return the base of RoPE's frequencies, which transformers moved into `rope_parameters`."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"  # transformers prefers the first
    rope = {} if values.get(name) is None else values[name]
    if not isinstance(rope, Mapping):
        raise ValueError(f"config: {name} should be a mapping, got {shown(rope)}")
    rope_type = rope.get("rope_type", rope.get("type", "axial"))
    if rope_type not in ("axial", "default"):
        raise ValueError(f"config: rope_type {shown(rope_type)} is not supported, expected 'axial'")
    stated = [part["rope_theta"] for part in (rope, values) if part.get("rope_theta") is not None]
    if len(stated) == 2 and not (isinstance(stated[1], int | float) and stated[0] == stated[1]):
        raise ValueError(f"config: rope_theta is {shown(stated[0])} in {name} and {shown(stated[1])} beside it")
    return stated[0] if stated else DEFAULT_ROPE_THETA
