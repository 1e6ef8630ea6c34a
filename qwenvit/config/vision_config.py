"""`VisionConfig`: one frozen description of a vision tower for every Qwen family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenvit.config.families import FAMILIES, Family
from qwenvit.config.hf_config import fields_from_hf
from qwenvit.config.limits import LIMITS, MAX_ROPE_THETA, positive_integer, shown

HF_ACTIVATIONS = ("quick_gelu", "silu", "gelu_pytorch_tanh", "gelu")  # transformers' names
NORM_EPS = 1e-6  # the modelling code of every family fixes it; config.json does not state it


@dataclass(frozen=True)
class VisionConfig:
    """The structure and sizes of one vision tower. Widths are in channels; patches and windows in pixels.

    `hidden_size` is the tower's width and `out_hidden_size` the language model's, for every family. (Qwen2-VL's
    config.json calls them `embed_dim` and `hidden_size`.)

    Raises:
        ValueError: a field has a value that no tower of the family can have.
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
    """Side of an attention window in pixels; None in towers without windows."""
    fullatt_block_indexes: tuple[int, ...] = ()
    """Blocks of a windowed tower that attend to whole frames; empty in towers without windows."""
    num_position_embeddings: int | None = None
    """Entries of the square table of learned positions; None in towers without one."""
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Blocks whose outputs become DeepStack features."""
    tokens_per_second: int | None = None
    """Temporal M-RoPE positions per second of video; None in families that do not state it."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def traits(self) -> Family:
        """The structure that the family fixes: kinds of norm and MLP, windows, learned positions, DeepStack."""
        return FAMILIES[self.family]

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Number of patches merged into one output token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Values in one row of `pixel_values`: channels x frames x height x width of a patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def position_grid(self) -> int:
        """Side of the square table of learned positions; 0 in towers without one."""
        return math.isqrt(self.num_position_embeddings or 0)

    @property
    def window_patches(self) -> int:
        """Patches of a whole attention window; 0 in towers without windows."""
        return ((self.window_size or 0) // self.patch_size) ** 2

    def is_full_attention(self, block: int) -> bool:
        """Return whether block number `block` attends to whole frames rather than windows."""
        return self.window_size is None or block in self.fullatt_block_indexes

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], family: str | None = None) -> "VisionConfig":
        """Build the config from a Hugging Face `config.json`.

        The vision config may be nested in any way (`vision_config`, `thinker_config.vision_config`, `vlm_config`, ...).
        Every key that it leaves out has the default of transformers' class.

        Args:
            config: the parsed file, of a whole model or of the vision tower alone.
            family: the tower's family if the caller knows it; then every `model_type` is ignored.

        Raises:
            TypeError: `config` is not a mapping.
            UnknownModelType: no `model_type` names a family. (A ValueError.)
            ValueError: `family` is unknown, there is no vision config or there are several different ones, values
                contradict each other, or a value is one that no tower of the family can have.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config: expected a mapping as read from config.json, got {type(config).__name__}")
        return cls(**fields_from_hf(config, family))

    def to_hf(self) -> dict[str, Any]:
        """Return the vision config as transformers' config classes read it (the inverse of `from_hf`)."""
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


def _check(c: VisionConfig) -> None:
    if not isinstance(c.family, str) or c.family not in FAMILIES:
        raise ValueError(f"family: expected one of {sorted(FAMILIES)}, got {shown(c.family)}")
    optional = {
        "window_size": (c.traits.windowed, "windows"),
        "num_position_embeddings": (c.traits.learned_positions, "learned positions"),
    }
    for name, limit in LIMITS.items():
        value = getattr(c, name)
        if name in optional:
            expected, what = optional[name]
            if expected != (value is not None):
                raise ValueError(f"{name}: {c.family} towers have {'' if expected else 'no '}{what}")
        if value is not None or name not in (*optional, "tokens_per_second"):
            positive_integer(name, value, limit)
    if isinstance(c.rope_theta, bool) or not isinstance(c.rope_theta, int | float) or not c.rope_theta > 0:
        raise ValueError(f"rope_theta: expected a positive number, got {shown(c.rope_theta)}")
    if not 1 / MAX_ROPE_THETA <= c.rope_theta <= MAX_ROPE_THETA:
        raise ValueError(
            f"rope_theta: expected a number from {1 / MAX_ROPE_THETA} to {MAX_ROPE_THETA}, got {shown(c.rope_theta)}"
        )
    if c.hidden_act not in HF_ACTIVATIONS:
        raise ValueError(f"hidden_act: expected one of {HF_ACTIVATIONS}, got {shown(c.hidden_act)}")
    _check_relations(c)
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        _check_block_indexes(name, getattr(c, name), c.depth)


def _check_relations(c: VisionConfig) -> None:
    """Raise ValueError if values contradict each other or the family."""
    if c.hidden_size % c.num_heads or c.head_dim % 4:
        raise ValueError(
            f"num_heads: {c.hidden_size} channels do not split into {c.num_heads} heads of a multiple of 4 channels "
            "(2-D RoPE rotates pairs of two coordinates)"
        )
    if c.family == "qwen2_vl" and c.intermediate_size % c.hidden_size:
        raise ValueError(
            f"intermediate_size: expected a multiple of hidden_size={c.hidden_size} in a qwen2_vl tower, "
            f"got {c.intermediate_size}"
        )
    if c.window_size is not None and c.window_size % (c.patch_size * c.spatial_merge_size):
        raise ValueError(
            f"window_size: expected a multiple of patch_size x spatial_merge_size = "
            f"{c.patch_size * c.spatial_merge_size} pixels, got {c.window_size}"
        )
    if c.num_position_embeddings is not None and c.position_grid**2 != c.num_position_embeddings:
        raise ValueError(f"num_position_embeddings: expected a square number, got {c.num_position_embeddings}")
    if c.fullatt_block_indexes and not c.traits.windowed:
        raise ValueError(
            f"fullatt_block_indexes: {c.family} towers have no windows, got {shown(c.fullatt_block_indexes)}"
        )
    if c.deepstack_visual_indexes and not c.traits.deepstack:
        raise ValueError(
            f"deepstack_visual_indexes: {c.family} towers have none, got {shown(c.deepstack_visual_indexes)}"
        )
    if c.tokens_per_second is not None and not c.traits.windowed:
        raise ValueError(f"tokens_per_second: {c.family} configs have none, got {c.tokens_per_second}")


def _check_block_indexes(name: str, indexes: tuple[int, ...], depth: int) -> None:
    """Raise ValueError unless these are increasing numbers of blocks, in a tuple."""
    of_blocks = isinstance(indexes, tuple) and all(type(index) is int and 0 <= index < depth for index in indexes)
    if not of_blocks or list(indexes) != sorted(set(indexes)):
        raise ValueError(
            f"{name}: expected a tuple of increasing block numbers below depth={depth}, got {shown(indexes)}"
        )
