"""Write a model's folder as vLLM loads it, but for the weights: config, tokenizer and processor, made from nothing."""

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from common.torchvision_cpu import define_torchvision_schemas
from generate_bench.models import TEXT_CONFIGS, hf_config
from vllm_bench.cases import Shape

SPECIAL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Tokens by the name of the config's field. The tokenizer knows these, the two of chats, and single bytes."""
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TINY_TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY_ROPE = {"qwen2_5_vl": [8, 12, 12], "qwen3_vl": [12, 10, 10]}
LEAST_PIXELS = {"qwen2_5_vl": 3136, "qwen3_vl": 65536}
MOST_PIXELS = {"qwen2_5_vl": 12845056, "qwen3_vl": 16777216}
"""Bounds of the published processors."""


def text_config(shape: Shape) -> dict[str, Any]:
    text = TEXT_CONFIGS[shape.model] | {"num_hidden_layers": shape.text_layers}
    if shape.tiny:
        rope = text["rope_parameters"] | {"mrope_section": TINY_ROPE[shape.vision.family]}
        text |= TINY_TEXT | {"vocab_size": 1024, "head_dim": 64, "rope_parameters": rope}
    return text


def write_checkpoint(shape: Shape, folder: Path) -> Path:
    """Write the folder of a model with official widths (small ones for a tiny shape); return it."""
    define_torchvision_schemas()
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens([*SPECIAL_TOKENS.values(), *CHAT_TOKENS], special_tokens=True)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    config = hf_config(shape.vision, text_config(shape), ids)
    config.dtype = shape.dtype
    family = shape.vision.family
    pixels = {"shortest_edge": 3136 if shape.tiny else LEAST_PIXELS[family], "longest_edge": MOST_PIXELS[family]}
    if family == "qwen3_vl":
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = Qwen2VLImageProcessor(patch_size=shape.vision.patch_size, size=pixels, **half)
        processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor())
        config.architectures = ["Qwen3VLForConditionalGeneration"]
    else:
        images = Qwen2VLImageProcessor(patch_size=shape.vision.patch_size, size=pixels)
        processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
