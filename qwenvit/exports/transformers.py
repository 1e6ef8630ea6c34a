"""Embeddings as `mm_encoder_outputs` of transformers 5.18 and later."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenvit.exports.checks import check_items

if TYPE_CHECKING:
    from qwenvit.outputs import ItemEmbeddings


def to_transformers(items: Sequence["ItemEmbeddings"]) -> dict[str, Any]:
    """Return the outputs by kind; `pooler_output` and each DeepStack level are tuples with a tensor for each item."""
    check_items(items)
    kinds = {"image": False, "video": True}
    by_kind = {kind: [item for item in items if item.is_video == is_video] for kind, is_video in kinds.items()}
    return {kind: _output(chosen) for kind, chosen in by_kind.items() if chosen}


def _output(items: Sequence["ItemEmbeddings"]) -> Any:
    tokens: Any = tuple(item.tokens for item in items)  # transformers' annotations are those of its towers
    if not items[0].config.traits.deepstack:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=tokens)
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    levels: Any = list(zip(*(item.deepstack for item in items), strict=True))
    return BaseModelOutputWithDeepstackFeatures(pooler_output=tokens, deepstack_features=levels)
