"""The families of Qwen vision towers and how their structures differ."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """The structure that all towers of a family share and that config.json does not state."""

    model_types: tuple[str, ...]
    """Every `model_type` of the family; the first is the vision config's in transformers >= 5.23."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm in the blocks: LayerNorm or RMSNorm."""
    gated_mlp: bool = False
    """Whether the MLP is gated (SwiGLU)."""
    separate_qkv: bool = False
    """Whether checkpoints store Q, K and V as three weights."""
    windowed: bool = False
    """Whether some blocks attend within windows."""
    learned_positions: bool = False
    """Whether patches get learned positions besides RoPE."""
    deepstack: bool = False
    """Whether chosen blocks emit DeepStack features (arXiv:2406.04334)."""
    video_times: Literal["unused", "positions", "text"] = "unused"
    """How the language model learns when frames are shown: by temporal positions, or by timestamps in the prompt."""

    @property
    def patch_bias(self) -> bool:
        """Whether the patch embedding has a bias: it does exactly in the families with learned positions."""
        return self.learned_positions


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(("qwen2_vl_vision", "qwen2_vl")),
    "qwen2_5_vl": Family(
        ("qwen2_5_vl_vision", "qwen2_5_vl"), "rms", gated_mlp=True, windowed=True, video_times="positions"
    ),
    "qwen2_5_omni": Family(
        ("qwen2_5_omni_vision_encoder", "qwen2_5_omni", "qwen2_5_omni_thinker"),
        "rms",
        gated_mlp=True,
        separate_qkv=True,
        windowed=True,
        video_times="positions",
    ),
    "qwen3_vl": Family(
        ("qwen3_vl_vision", "qwen3_vl", "qwen3_vl_moe_vision", "qwen3_vl_moe"),
        learned_positions=True,
        deepstack=True,
        video_times="text",
    ),
    "qwen3_omni": Family(
        ("qwen3_omni_moe_vision_encoder", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        learned_positions=True,
        deepstack=True,
        video_times="positions",
    ),
    "qwen3_5": Family(
        ("qwen3_5_vision", "qwen3_5", "qwen3_5_moe_vision", "qwen3_5_moe"),
        learned_positions=True,
        video_times="text",
    ),
}
"""Families by name."""
FAMILY_OF_MODEL_TYPE: dict[str, str] = {
    model_type: name for name, family in FAMILIES.items() for model_type in family.model_types
}
"""Family name by `model_type`."""


class UnknownModelType(ValueError):  # noqa: N818 (says what it is about, like KeyError)
    """No `model_type` of a config.json names a family; the names of the checkpoint's tensors may tell it."""
