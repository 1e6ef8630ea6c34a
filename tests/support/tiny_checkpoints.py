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
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
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
_VISION = {"depth": 4, "hidden_size": 128, "num_heads": 2, "out_hidden_size": 128}  # heads as wide as real ones


def save_tiny_checkpoint(family: str, folder: Path, seed: int = 0) -> None:
    """Write a model in fp32, with random weights.

    Args:
        family: `"qwen2_vl"`, `"qwen2_5_vl"`, `"qwen3_vl"` or `"qwen3_5"`.
        folder: where to.
        seed: another one gives other weights.
    """
    tokenizer = _tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e6}
    match family:
        case "qwen2_vl":
            text = _TEXT | {"rope_parameters": rope | {"mrope_section": [8, 12, 12]}}
            model = build(family, text, patch_size=14, depth=4, embed_dim=128, hidden_size=128)
            processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())
        case "qwen2_5_vl":
            text = _TEXT | {"rope_parameters": rope | {"mrope_section": [8, 12, 12]}}
            windows = {"window_size": 56, "fullatt_block_indexes": [1, 3]}
            model = build(family, text, patch_size=14, **_VISION, **windows)
            processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())
        case "qwen3_vl" | "qwen3_5":
            rope |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
            text = _TEXT | {"head_dim": 64, "rope_parameters": rope}
            if family == "qwen3_5":
                text |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}  # what vLLM takes on a CPU
            deepstack = {"deepstack_visual_indexes": [0, 2]} if family == "qwen3_vl" else {}
            model = build(family, text, patch_size=16, **_VISION, **deepstack)
            half = [0.5, 0.5, 0.5]
            size = {"shortest_edge": 65536, "longest_edge": 16777216}
            images = Qwen2VLImageProcessor(patch_size=16, size=size, image_mean=half, image_std=half)
            processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor())
    for name, token in _SPECIAL_TOKENS.items():
        setattr(model.config, name, tokenizer.convert_tokens_to_ids(token))
    processor.chat_template = _CHAT_TEMPLATE
    _randomise(model, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_tiny_text_checkpoint(folder: Path) -> None:
    """Write a Qwen3 language model without a vision tower."""
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=320, intermediate_size=96, num_hidden_layers=2, head_dim=64, **_TEXT)
    )
    _randomise(model, 0)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> Qwen2Tokenizer:
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens(list(_SPECIAL_TOKENS.values()), special_tokens=True)
    return tokenizer


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw weights that keep activations near 1: with smaller ones, images would hardly change the logits."""
    torch.manual_seed(seed)
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
