"""How each family places its vision tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qwenvit.config.families import FAMILY_OF_MODEL_TYPE
from qwenvit.config.hf_config import positive_integer
from qwenvit.config.vision_config import VisionConfig


class HFConfig(Protocol):
    """A transformers config object."""

    model_type: str


@dataclass(frozen=True)
class Rules:
    """How a family places vision tokens."""

    image_token_id: int = 151655
    video_token_id: int = 151656
    tokens_per_second: int | None = None
    """Temporal positions per second of video; None where frames are numbered."""
    frames_apart: bool = False
    """Whether timestamps stand between a video's frame groups, each of which then starts anew like an image."""
    spatial_merge_size: int = 2


# Token ids and tokens_per_second as the published config.json files of each family have them.
RULES = {
    "qwen2_vl": Rules(),
    "qwen2_5_vl": Rules(tokens_per_second=2),
    "qwen3_vl": Rules(frames_apart=True),
    "qwen3_5": Rules(image_token_id=248056, video_token_id=248057, frames_apart=True),
}


def rules_of(
    family: str | VisionConfig | HFConfig | Mapping[str, Any],
    tokens_per_second: int | None = None,
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    spatial_merge_size: int | None = None,
) -> Rules:
    """The family's rules with what its config and the caller say instead; arguments and errors as `rope_index`."""
    stated: dict[str, Any] = {}
    if isinstance(family, str):
        name: object = family
    elif isinstance(family, VisionConfig):
        name = family.family
        stated = {"spatial_merge_size": family.spatial_merge_size, "tokens_per_second": family.tokens_per_second}
    else:
        read = family.get if isinstance(family, Mapping) else lambda key: getattr(family, key, None)
        if not isinstance(model_type := read("model_type"), str):
            raise TypeError(
                f"family: expected a name, VisionConfig or transformers config, got {type(family).__name__}"
            )
        name = FAMILY_OF_MODEL_TYPE.get(model_type, model_type)
        vision = read("vision_config") or family
        read_vision = vision.get if isinstance(vision, Mapping) else lambda key: getattr(vision, key, None)
        stated = {key: read(key) for key in ("image_token_id", "video_token_id")}
        stated |= {key: read_vision(key) for key in ("spatial_merge_size", "tokens_per_second")}
    if name not in RULES:
        raise ValueError(f"family: expected one of {', '.join(RULES)}, got {name!r}")
    rules = RULES[str(name)]
    if rules.tokens_per_second is None:
        stated.pop("tokens_per_second", None)
        if tokens_per_second is not None:
            raise ValueError(f"tokens_per_second: {name} numbers frames and has no time scale; leave it out")
    asked = {
        "tokens_per_second": tokens_per_second,
        "image_token_id": image_token_id,
        "video_token_id": video_token_id,
        "spatial_merge_size": spatial_merge_size,
    }
    stated |= {key: value for key, value in asked.items() if value is not None}
    if not (stated := {key: value for key, value in stated.items() if value is not None}):
        return rules
    for key, value in stated.items():
        if key in ("tokens_per_second", "spatial_merge_size"):
            positive_integer(key, value)
        elif not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{key}: expected an integer, got {value!r}")
    rules = replace(rules, **stated)
    if rules.image_token_id == rules.video_token_id:
        raise ValueError(
            f"video_token_id: expected another id than image_token_id, got {rules.video_token_id} for both"
        )
    return rules
