"""Tiny checkpoints of whole models: language model, tower, tokenizer and processor, as servers load them."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from support.tiny_models import build

IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
"""How prompts write an image and a video."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    f"{{% elif part.type == 'video' %}}{VIDEO}{{% else %}}{IMAGE}{{% endif %}}"
    "{% endfor %}{% endfor %}"
)
_SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# vLLM takes no head_dim below 32.
_TEXT = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
_VISION = {"depth": 4, "hidden_size": 64, "out_hidden_size": 128}


def save_tiny_checkpoint(family: str, folder: Path) -> None:
    """Write a model of `"qwen2_5_vl"` or `"qwen3_vl"` in fp32, with seeded random weights."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens(list(_SPECIAL_TOKENS.values()), special_tokens=True)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    match family:
        case "qwen2_5_vl":
            text = _TEXT | {"rope_parameters": rope | {"mrope_section": [8, 12, 12]}}
            windows = {"window_size": 56, "fullatt_block_indexes": [1, 3]}
            model = build(family, text, patch_size=14, **_VISION, **windows)
            processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())
        case "qwen3_vl":
            rope |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
            text = _TEXT | {"head_dim": 64, "rope_parameters": rope}
            model = build(family, text, patch_size=16, **_VISION, deepstack_visual_indexes=[0, 2])
            half = [0.5, 0.5, 0.5]
            size = {"shortest_edge": 65536, "longest_edge": 16777216}
            images = Qwen2VLImageProcessor(patch_size=16, size=size, image_mean=half, image_std=half)
            processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor())
    for name, token in _SPECIAL_TOKENS.items():
        setattr(model.config, name, tokenizer.convert_tokens_to_ids(token))
    processor.chat_template = _CHAT_TEMPLATE
    _randomise(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _randomise(model: PreTrainedModel) -> None:
    """Draw weights that keep activations near 1: with smaller ones, images would hardly change the logits."""
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 1:
                nn.init.normal_(parameter, mean=1, std=0.1)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    nn.init.normal_(model.lm_head.weight, std=3 * model.lm_head.in_features**-0.5)
