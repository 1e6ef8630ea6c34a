"""What transformers takes for a vision config's keys that config.json leaves out.

The values are those of transformers 5.23's vision config classes. Classes of one family (`qwen3_vl` and `qwen3_vl_moe`,
`qwen3_5` and `qwen3_5_moe`) have the same defaults. Qwen2.5-Omni's are those of Qwen2.5-VL without `tokens_per_second`,
which its class does not have.

Some defaults are no published tower's values: Qwen2.5-VL's `hidden_size` is 3584 here and 1280 in all of them.
"""

from typing import Any

_QWEN2_VL: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,  # the output width; the tower's is `embed_dim`
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN2_5_OMNI: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": None,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
_QWEN3_5: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
}
_QWEN3_VL = _QWEN3_5 | {"deepstack_visual_indexes": (8, 16, 24)}

DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_5_OMNI | {"tokens_per_second": 4},
    "qwen2_5_omni": _QWEN2_5_OMNI,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_omni": _QWEN3_VL,
    "qwen3_5": _QWEN3_5,
}
"""By family: the keys of the vision config that transformers reads, and their defaults."""
DEFAULT_ROPE_THETA = 10000.0
"""RoPE's base where config.json states none, in every family."""
OTHER_SPELLINGS = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
"""Keys of every family that transformers reads under another name too: the `attribute_map` of its classes."""
