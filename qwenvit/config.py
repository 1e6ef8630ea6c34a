"""What a Qwen vision tower is made of: one frozen description for every family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenvit.families import FAMILIES, FAMILY_OF_MODEL_TYPE, Family

ACTIVATIONS = ("quick_gelu", "silu", "gelu_pytorch_tanh", "gelu")
NORM_EPS = 1e-6  # fixed in every published tower; no config.json carries it


@dataclass(frozen=True)
class VisionConfig:
    """The shape of one vision tower. Widths are in channels, `window_size` in pixels.

    `hidden_size` is always the tower's own width and `out_hidden_size` the language model's, also for Qwen2-VL,
    whose config.json calls them `embed_dim` and `hidden_size`.

    Raises:
        ValueError: a value that no tower of the family could have, named with what was expected.
    """

    family: str
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    hidden_act: str
    patch_size: int
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    rope_theta: float = 10000.0
    window_size: int | None = None
    """Side of an attention window in pixels; None where every block attends to the whole frame."""
    fullatt_block_indexes: tuple[int, ...] = ()
    """Blocks that attend to the whole frame in a windowed tower; empty where all do."""
    num_position_embeddings: int | None = None
    """Entries of the square learned position table; None where there is none."""
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Blocks after which DeepStack features are taken."""
    tokens_per_second: int | None = None
    """Temporal M-RoPE positions per second of video; None where the family has none."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def traits(self) -> Family:
        """The family's structure: kinds of norm and MLP, windows, learned positions, DeepStack."""
        return FAMILIES[self.family]

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches merged into one output token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Values in one row of `pixel_values`: channels x frames x height x width of a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def position_grid(self) -> int:
        """Side of the learned position table (0 where there is none)."""
        return math.isqrt(self.num_position_embeddings or 0)

    def is_full_attention(self, block: int) -> bool:
        """Whether block number `block` attends to whole frames rather than windows."""
        return self.window_size is None or block in self.fullatt_block_indexes

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """Read a Hugging Face `config.json`: composite (`vision_config`, `thinker_config`) or the tower's own.

        Raises:
            TypeError: `config` is not a mapping.
            ValueError: unknown family, missing key, unsupported activation or values that contradict each other.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config: expected a mapping as read from config.json, got {type(config).__name__}")
        return _from_hf(cls, config)

    def to_hf(self) -> dict[str, Any]:
        """The tower's own config as transformers' vision config classes read it (inverse of `from_hf`)."""
        hf: dict[str, Any] = {
            "model_type": self.traits.model_types[0],
            "depth": self.depth,
            "num_heads": self.num_heads,
            "hidden_act": self.hidden_act,
            "in_channels": self.in_channels,
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "spatial_merge_size": self.spatial_merge_size,
            "rope_parameters": {"rope_type": "axial", "rope_theta": self.rope_theta},
        }
        if self.family == "qwen2_vl":
            hf |= {"embed_dim": self.hidden_size, "hidden_size": self.out_hidden_size}
            hf |= {"mlp_ratio": self.intermediate_size // self.hidden_size}
        else:
            hf |= {"hidden_size": self.hidden_size, "out_hidden_size": self.out_hidden_size}
            hf |= {"intermediate_size": self.intermediate_size}
        if self.traits.windowed:
            hf |= {"window_size": self.window_size, "fullatt_block_indexes": list(self.fullatt_block_indexes)}
        if self.traits.learned_positions:
            hf |= {"num_position_embeddings": self.num_position_embeddings}
        if self.traits.deepstack:
            hf |= {"deepstack_visual_indexes": list(self.deepstack_visual_indexes)}
        if self.tokens_per_second is not None:
            hf |= {"tokens_per_second": self.tokens_per_second}
        return hf


def family_of(config: Mapping[str, Any]) -> str:
    """The family a config.json describes, from its own and its vision config's `model_type`.

    Raises:
        ValueError: no known `model_type`, or two that name different families.
    """
    vision = _vision_part(config)
    types = [part["model_type"] for part in (vision, config) if part.get("model_type")]
    if not types:
        raise ValueError(f"config: no model_type, expected one of {sorted(FAMILY_OF_MODEL_TYPE)}")
    if unknown := [t for t in types if t not in FAMILY_OF_MODEL_TYPE]:
        raise ValueError(f"config: unknown model_type {unknown[0]!r}, expected one of {sorted(FAMILY_OF_MODEL_TYPE)}")
    families = {FAMILY_OF_MODEL_TYPE[t] for t in types}
    if len(families) > 1:
        raise ValueError(f"config: model_type {types[1]!r} holds a vision_config of another family, {types[0]!r}")
    return families.pop()


def _vision_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("thinker_config", "vision_config"):
        if key in config:
            if not isinstance(config[key], Mapping):
                raise ValueError(f"config: {key} should be a mapping, got {config[key]!r}")
            config = config[key]
    return config


def _from_hf(cls: type[VisionConfig], config: Mapping[str, Any]) -> VisionConfig:
    family = family_of(config)
    traits = FAMILIES[family]
    vision = _vision_part(config)

    def get(*spellings: str, default: Any = None) -> Any:
        found = {name: vision[name] for name in spellings if vision.get(name) is not None}
        if len({repr(value) for value in found.values()}) > 1:
            raise ValueError(f"config: two spellings of one value disagree: {found}")
        value = next(iter(found.values()), default)
        if value is None:
            raise ValueError(f"config: {' / '.join(spellings)} is missing from the {family} vision config")
        return value

    swapped = family == "qwen2_vl"  # there `hidden_size` is the output width
    hidden_size = _integer("embed_dim", get("embed_dim")) if swapped else get("hidden_size")
    if swapped and vision.get("intermediate_size") is None:
        ratio = get("mlp_ratio", default=4)
        if not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
            raise ValueError(f"config: mlp_ratio should be a positive number, got {ratio!r}")
        intermediate_size = int(hidden_size * ratio)
    else:
        intermediate_size = get("intermediate_size")
    if vision.get("apply_vit_abs_pos_embed") is False:
        raise ValueError("config: apply_vit_abs_pos_embed=False: a tower without its position table is unsupported")
    return cls(
        family=family,
        depth=get("depth", "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=get("num_heads", "num_attention_heads"),
        out_hidden_size=get("hidden_size") if swapped else get("out_hidden_size"),
        hidden_act=get("hidden_act", default=traits.hidden_act),
        patch_size=get("patch_size", "spatial_patch_size", default=16 if traits.learned_positions else 14),
        temporal_patch_size=get("temporal_patch_size", default=2),
        spatial_merge_size=get("spatial_merge_size", default=2),
        in_channels=get("in_channels", "in_chans", default=3),
        rope_theta=_rope_theta(vision),
        window_size=get("window_size", default=112) if traits.windowed else None,
        fullatt_block_indexes=tuple(get("fullatt_block_indexes", default=(7, 15, 23, 31))) if traits.windowed else (),
        num_position_embeddings=get("num_position_embeddings", default=2304) if traits.learned_positions else None,
        deepstack_visual_indexes=tuple(get("deepstack_visual_indexes", default=(8, 16, 24)))
        if traits.deepstack
        else _none_of(vision, "deepstack_visual_indexes", family),
        tokens_per_second=vision.get("tokens_per_second", 4 if family == "qwen2_5_vl" else None)
        if traits.windowed
        else None,
    )


def _rope_theta(vision: Mapping[str, Any]) -> float:
    rope = vision.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config: rope_parameters should be a mapping, got {rope!r}")
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise ValueError(f"config: rope_type {rope['rope_type']!r} is not supported, expected 'axial'")
    stated = [part["rope_theta"] for part in (rope, vision) if part.get("rope_theta") is not None]
    if len(stated) == 2 and stated[0] != stated[1]:
        raise ValueError(f"config: rope_theta is {stated[0]!r} in rope_parameters and {stated[1]!r} beside it")
    return stated[0] if stated else 10000.0


def _none_of(vision: Mapping[str, Any], key: str, family: str) -> tuple[()]:
    if vision.get(key):
        raise ValueError(f"config: {key}={vision[key]} in a {family} config, whose towers have none")
    return ()


def _integer(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return value


def _check(c: VisionConfig) -> None:
    if c.family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {c.family!r}")
    for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size"):
        _integer(name, getattr(c, name))
    for name in ("temporal_patch_size", "spatial_merge_size", "in_channels"):
        _integer(name, getattr(c, name))
    if not isinstance(c.rope_theta, int | float) or not 0 < c.rope_theta < math.inf:
        raise ValueError(f"rope_theta: expected a positive number, got {c.rope_theta!r}")
    if c.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act: expected one of {ACTIVATIONS}, got {c.hidden_act!r}")
    if c.hidden_size % c.num_heads or c.head_dim % 4:
        raise ValueError(
            f"num_heads: {c.hidden_size} channels do not split into {c.num_heads} heads of a multiple of 4 channels "
            "(2-D RoPE rotates pairs of two coordinates)"
        )
    if c.family == "qwen2_vl" and c.intermediate_size % c.hidden_size:
        raise ValueError(
            f"intermediate_size: qwen2_vl's is a whole mlp_ratio times hidden_size={c.hidden_size}, "
            f"got {c.intermediate_size}"
        )
    if c.traits.windowed != (c.window_size is not None):
        raise ValueError(f"window_size: {c.family} towers have {'' if c.traits.windowed else 'no '}windows")
    if c.window_size is not None and _integer("window_size", c.window_size) % (c.patch_size * c.spatial_merge_size):
        raise ValueError(
            f"window_size: expected a multiple of patch_size x spatial_merge_size = "
            f"{c.patch_size * c.spatial_merge_size} pixels, got {c.window_size}"
        )
    if c.traits.learned_positions != (c.num_position_embeddings is not None):
        with_or_without = "learned positions" if c.traits.learned_positions else "no learned positions"
        raise ValueError(f"num_position_embeddings: {c.family} towers have {with_or_without}")
    if c.num_position_embeddings is not None and c.position_grid**2 != c.num_position_embeddings:
        raise ValueError(f"num_position_embeddings: expected a square number, got {c.num_position_embeddings}")
    if c.deepstack_visual_indexes and not c.traits.deepstack:
        raise ValueError(f"deepstack_visual_indexes: {c.family} towers have none, got {c.deepstack_visual_indexes}")
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        indexes = getattr(c, name)
        if list(indexes) != sorted({i for i in indexes if isinstance(i, int) and 0 <= i < c.depth}):
            raise ValueError(f"{name}: expected increasing block numbers below depth={c.depth}, got {indexes}")
