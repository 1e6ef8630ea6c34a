"""Parts of Qwen-VL models that transformers has loaded, replaced by qwenvit's, and put back."""

from qwenvit.integrations.transformers.attention import AttentionHandle, use_attention
from qwenvit.integrations.transformers.combined import QwenvitHandle, use_qwenvit
from qwenvit.integrations.transformers.rope_index import RopeIndexHandle, use_rope_index
from qwenvit.integrations.transformers.tower import TowerHandle, use_tower

__all__ = [
    "AttentionHandle",
    "QwenvitHandle",
    "RopeIndexHandle",
    "TowerHandle",
    "use_attention",
    "use_qwenvit",
    "use_rope_index",
    "use_tower",
]
