"""The published checkpoints and the values of their towers.

| name                  | depth | width | MLP  | heads | out width | patch | extras                                |
|-----------------------|-------|-------|------|-------|-----------|-------|---------------------------------------|
| qwen2_vl-*            | 32    | 1280  | 5120 | 16    | 1536–8192 | 14    |                                       |
| qwen2_5_vl-3b, -7b    | 32    | 1280  | 3420 | 16    | 2048–3584 | 14    | 112 px windows, full in 7, 15, 23, 31 |
| qwen2_5_vl-32b, -72b  | 32    | 1280  | 3456 | 16    | 5120–8192 | 14    | 112 px windows, full in 7, 15, 23, 31 |
| qwen3_vl-2b, -4b      | 24    | 1024  | 4096 | 16    | 2048–2560 | 16    | DeepStack after 5, 11, 17             |
| qwen3_vl-8b and up    | 27    | 1152  | 4304 | 16    | 2048–5120 | 16    | DeepStack after 8, 16, 24             |
| qwen3_5-0.8b          | 12    | 768   | 3072 | 12    | 1024      | 16    |                                       |
| qwen3_5-2b, -4b       | 24    | 1024  | 4096 | 16    | 2048–2560 | 16    |                                       |
| qwen3_5-9b and up     | 27    | 1152  | 4304 | 16    | 2048–5120 | 16    | also Qwen3.6 and Qwen3.8              |
| qwen2_5_omni-*        | 32    | 1280  | 3420 | 16    | 2048–3584 | 14    | as Qwen2.5-VL, separate q, k and v    |
| qwen3_omni-30b-a3b    | 27    | 1152  | 4304 | 16    | 2048      | 16    | as Qwen3-VL, other merger names       |
"""

from dataclasses import dataclass, replace

from qwenvit.config.vision_config import VisionConfig

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
"""Hub repository that `qwenvit.encode` and the command line load when no model is named."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint: its Hub repository and the config of its vision tower."""

    repo_id: str
    config: VisionConfig


_QWEN2 = VisionConfig(
    family="qwen2_vl",
    depth=32,
    hidden_size=1280,
    intermediate_size=5120,
    num_heads=16,
    out_hidden_size=3584,
    hidden_act="quick_gelu",
    patch_size=14,
)
_QWEN2_5 = VisionConfig(
    family="qwen2_5_vl",
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    out_hidden_size=3584,
    hidden_act="silu",
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=(7, 15, 23, 31),
    tokens_per_second=2,
)
_QWEN3_LARGE = VisionConfig(
    family="qwen3_vl",
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    out_hidden_size=4096,
    hidden_act="gelu_pytorch_tanh",
    patch_size=16,
    num_position_embeddings=2304,
    deepstack_visual_indexes=(8, 16, 24),
)
_QWEN3_SMALL = replace(
    _QWEN3_LARGE, depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=(5, 11, 17)
)


def _qwen3_5(base: VisionConfig, out_hidden_size: int) -> VisionConfig:
    return replace(base, family="qwen3_5", deepstack_visual_indexes=(), out_hidden_size=out_hidden_size)


def _published(repo_id: str, base: VisionConfig, out_hidden_size: int) -> Published:
    return Published(repo_id, replace(base, out_hidden_size=out_hidden_size))


PUBLISHED: dict[str, Published] = {
    "qwen2_vl-2b": _published("Qwen/Qwen2-VL-2B-Instruct", _QWEN2, 1536),
    "qwen2_vl-7b": _published("Qwen/Qwen2-VL-7B-Instruct", _QWEN2, 3584),
    "qwen2_vl-72b": _published("Qwen/Qwen2-VL-72B-Instruct", _QWEN2, 8192),
    "qwen2_5_vl-3b": _published("Qwen/Qwen2.5-VL-3B-Instruct", _QWEN2_5, 2048),
    "qwen2_5_vl-7b": _published("Qwen/Qwen2.5-VL-7B-Instruct", _QWEN2_5, 3584),
    "qwen2_5_vl-32b": _published("Qwen/Qwen2.5-VL-32B-Instruct", replace(_QWEN2_5, intermediate_size=3456), 5120),
    "qwen2_5_vl-72b": _published("Qwen/Qwen2.5-VL-72B-Instruct", replace(_QWEN2_5, intermediate_size=3456), 8192),
    "qwen3_vl-2b": _published("Qwen/Qwen3-VL-2B-Instruct", _QWEN3_SMALL, 2048),
    "qwen3_vl-4b": _published("Qwen/Qwen3-VL-4B-Instruct", _QWEN3_SMALL, 2560),
    "qwen3_vl-8b": _published("Qwen/Qwen3-VL-8B-Instruct", _QWEN3_LARGE, 4096),
    "qwen3_vl-32b": _published("Qwen/Qwen3-VL-32B-Instruct", _QWEN3_LARGE, 5120),
    "qwen3_vl-30b-a3b": _published("Qwen/Qwen3-VL-30B-A3B-Instruct", _QWEN3_LARGE, 2048),
    "qwen3_vl-235b-a22b": _published("Qwen/Qwen3-VL-235B-A22B-Instruct", _QWEN3_LARGE, 4096),
    "qwen3_5-0.8b": Published(
        "Qwen/Qwen3.5-0.8B",
        replace(_qwen3_5(_QWEN3_SMALL, 1024), depth=12, hidden_size=768, intermediate_size=3072, num_heads=12),
    ),
    "qwen3_5-2b": Published("Qwen/Qwen3.5-2B", _qwen3_5(_QWEN3_SMALL, 2048)),
    "qwen3_5-4b": Published("Qwen/Qwen3.5-4B", _qwen3_5(_QWEN3_SMALL, 2560)),
    "qwen3_5-9b": Published("Qwen/Qwen3.5-9B", _qwen3_5(_QWEN3_LARGE, 4096)),
    "qwen3_5-27b": Published("Qwen/Qwen3.5-27B", _qwen3_5(_QWEN3_LARGE, 5120)),
    "qwen3_6-35b-a3b": Published("Qwen/Qwen3.6-35B-A3B", _qwen3_5(_QWEN3_LARGE, 2048)),
    "qwen3_8-27b": Published("Qwen/Qwen3.8-27B", _qwen3_5(_QWEN3_LARGE, 5120)),
    "qwen2_5_omni-3b": _published(
        "Qwen/Qwen2.5-Omni-3B", replace(_QWEN2_5, family="qwen2_5_omni", tokens_per_second=25), 2048
    ),
    "qwen2_5_omni-7b": _published(
        "Qwen/Qwen2.5-Omni-7B", replace(_QWEN2_5, family="qwen2_5_omni", tokens_per_second=25), 3584
    ),
    "qwen3_omni-30b-a3b": _published(
        "Qwen/Qwen3-Omni-30B-A3B-Instruct", replace(_QWEN3_LARGE, family="qwen3_omni"), 2048
    ),
}
"""Published checkpoints by the short names that `compare_hf.py --random` and `qwenvit info` accept."""


def published_config(name: str) -> VisionConfig:
    """Return the config of a published tower by short name (`"qwen2_5_vl-7b"`) or Hub repository.

    Raises:
        ValueError: the name is not in the registry.
    """
    for short_name, checkpoint in PUBLISHED.items():
        if name in (short_name, checkpoint.repo_id):
            return checkpoint.config
    raise ValueError(f"name: expected one of {', '.join(PUBLISHED)}, got {name!r}")
