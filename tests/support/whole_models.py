"""Tiny whole models of transformers with the published patch sizes, the encoder of their vision tower, and prompts."""

import torch
from torch import Tensor, nn

from qwenvit.config.vision_config import VisionConfig
from qwenvit.encoder import Encoder
from support.tiny_models import IMAGE, VIDEO, VISION_END, VISION_START, build
from support.towers import ours_from

VISION_CHANGES = {
    "qwen2_vl": {"patch_size": 14},
    "qwen2_5_vl": {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    "qwen3_vl": {"patch_size": 16, "deepstack_visual_indexes": [0, 1]},
    "qwen3_5": {"patch_size": 16},
}


def whole_model(family: str) -> nn.Module:
    """Return a model of a family in fp32, its language model 64 wide."""
    return build(family, depth=2, initializer_range=0.2, **VISION_CHANGES[family])


def encoder_of(model: nn.Module) -> Encoder:
    """Return the encoder of a model's vision tower, with the published preprocessing."""
    return Encoder(ours_from(model.model.visual, VisionConfig.from_hf(model.config.to_dict())))


def prompt(*parts: int | tuple[int, int], length: int | None = None) -> dict[str, Tensor]:
    """Return the inputs of one prompt: numbers of text tokens, and pairs of a placeholder and how many.

    Args:
        parts: what the prompt is made of. Placeholders are between those around images.
        length: pad to this length on the left.
    """
    ids: list[int] = []
    for part in parts:
        count, token = part if isinstance(part, tuple) else (part, None)
        ids += (
            list(range(1 + len(ids), 1 + len(ids) + count))
            if token is None
            else [VISION_START, *[token] * count, VISION_END]
        )
    padding = (length or len(ids)) - len(ids)
    input_ids = torch.tensor([[0] * padding + ids])
    types = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    return {"input_ids": input_ids, "attention_mask": mask, "mm_token_type_ids": types}
