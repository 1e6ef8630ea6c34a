"""The families of Qwen vision towers and what sets their structure apart."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What sets one family's tower apart, beyond numbers a config.json carries."""

    model_types: tuple[str, ...]
    """Every `model_type` met for it, the tower's own (as transformers >= 5.23 writes it) first."""
    hidden_act: str
    norm: Literal["layer", "rms"] = "layer"
    gated_mlp: bool = False
    separate_qkv: bool = False
    windowed: bool = False
    learned_positions: bool = False
    deepstack: bool = False

    @property
    def patch_bias(self) -> bool:
        """Whether the patch embedding has a bias: exactly the towers with learned positions do."""
        return self.learned_positions


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(("qwen2_vl_vision", "qwen2_vl"), "quick_gelu"),
    "qwen2_5_vl": Family(("qwen2_5_vl_vision", "qwen2_5_vl"), "silu", "rms", gated_mlp=True, windowed=True),
    "qwen2_5_omni": Family(
        ("qwen2_5_omni_vision_encoder", "qwen2_5_omni", "qwen2_5_omni_thinker"),
        "silu",
        "rms",
        gated_mlp=True,
        separate_qkv=True,
        windowed=True,
    ),
    "qwen3_vl": Family(
        ("qwen3_vl_vision", "qwen3_vl", "qwen3_vl_moe_vision", "qwen3_vl_moe"),
        "gelu_pytorch_tanh",
        learned_positions=True,
        deepstack=True,
    ),
    "qwen3_omni": Family(
        ("qwen3_omni_moe_vision_encoder", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        "gelu_pytorch_tanh",
        learned_positions=True,
        deepstack=True,
    ),
    "qwen3_5": Family(
        ("qwen3_5_vision", "qwen3_5", "qwen3_5_moe_vision", "qwen3_5_moe"),
        "gelu_pytorch_tanh",
        learned_positions=True,
    ),
}
FAMILY_OF_MODEL_TYPE: dict[str, str] = {
    model_type: name for name, family in FAMILIES.items() for model_type in family.model_types
}
