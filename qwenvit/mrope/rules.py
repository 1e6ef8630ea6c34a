"""The rules by which each model family assigns M-RoPE positions to vision tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qwenvit.config.families import FAMILY_OF_MODEL_TYPE
from qwenvit.config.limits import positive_integer
from qwenvit.config.vision_config import VisionConfig


class HFConfig(Protocol):
    """A transformers config object."""

    model_type: str


@dataclass(frozen=True)
class MRopeRules:
    """How a family marks vision tokens and assigns positions to them."""

    image_token_id: int = 151655
    video_token_id: int = 151656
    tokens_per_second: int | None = None
    """Temporal positions per second of video; None where frame group `i` has temporal position `i`."""
    separate_frame_groups: bool = False
    """Whether text timestamps separate a video's frame groups, so that each starts like an image of its own."""
    spatial_merge_size: int = 2


# Token ids and tokens_per_second from the published config.json files of each family.
PUBLISHED_RULES = {
    "qwen2_vl": MRopeRules(),
    "qwen2_5_vl": MRopeRules(tokens_per_second=2),
    "qwen3_vl": MRopeRules(separate_frame_groups=True),
    "qwen3_5": MRopeRules(image_token_id=248056, video_token_id=248057, separate_frame_groups=True),
}


def resolve_rules(
    family: str | VisionConfig | HFConfig | Mapping[str, Any],
    tokens_per_second: int | None = None,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    spatial_merge_size: int | None = None,
) -> MRopeRules:
    """Return the family's published rules, overridden by its config and then by the arguments that are not None.

    Args:
        family: a family's name, or a VisionConfig, transformers config or its dict.
        tokens_per_second: temporal positions per second, for `qwen2_5_vl` alone.
        image_token_id: the id that marks image tokens.
        video_token_id: the id that marks video tokens.
        spatial_merge_size: patches merged into one token along each side.

    Raises:
        TypeError: `family` is neither a name nor a config.
        ValueError: the family is unknown, it has no time scale but one is given, or a value is invalid.
    """
    overrides: dict[str, Any] = {}
    if isinstance(family, str):
        name: object = family
    elif isinstance(family, VisionConfig):
        name = family.family
        overrides = {"spatial_merge_size": family.spatial_merge_size, "tokens_per_second": family.tokens_per_second}
    else:
        read = family.get if isinstance(family, Mapping) else lambda key: getattr(family, key, None)
        if not isinstance(model_type := read("model_type"), str):
            raise TypeError(
                f"family: expected a name, VisionConfig or transformers config, got {type(family).__name__}"
            )
        name = FAMILY_OF_MODEL_TYPE.get(model_type, model_type)
        vision = read("vision_config") or family
        read_vision = vision.get if isinstance(vision, Mapping) else lambda key: getattr(vision, key, None)
        overrides = {key: read(key) for key in ("image_token_id", "video_token_id")}
        overrides |= {key: read_vision(key) for key in ("spatial_merge_size", "tokens_per_second")}
    if name not in PUBLISHED_RULES:
        raise ValueError(f"family: expected one of {', '.join(PUBLISHED_RULES)}, got {name!r}")
    rules = PUBLISHED_RULES[str(name)]
    if rules.tokens_per_second is None:
        overrides.pop("tokens_per_second", None)
        if tokens_per_second is not None:
            raise ValueError(
                f"tokens_per_second: expected None, since {name} has no time scale, got {tokens_per_second}"
            )
    arguments = {
        "tokens_per_second": tokens_per_second,
        "image_token_id": image_token_id,
        "video_token_id": video_token_id,
        "spatial_merge_size": spatial_merge_size,
    }
    overrides |= {key: value for key, value in arguments.items() if value is not None}
    if not (overrides := {key: value for key, value in overrides.items() if value is not None}):
        return rules
    for key, value in overrides.items():
        if key in ("tokens_per_second", "spatial_merge_size"):
            positive_integer(key, value)
        elif not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{key}: expected an integer, got {value!r}")
    rules = replace(rules, **overrides)
    if rules.image_token_id == rules.video_token_id:
        raise ValueError(
            f"video_token_id: expected an id different from image_token_id, got {rules.video_token_id} for both"
        )
    return rules
