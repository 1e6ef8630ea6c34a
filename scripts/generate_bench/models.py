"""Whole transformers models of official shapes with seeded weights, and prompts with images for them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.hf_towers import seed_weights
from common.tower_inputs import Case, pixel_values
from qwenvit.config.published import published_config
from qwenvit.config.vision_config import VisionConfig

MODELS = {"Qwen2.5-VL-7B": "qwen2_5_vl-7b", "Qwen3-VL-8B": "qwen3_vl-8b"}
"""Names in `qwenvit.config.published`, by model."""
IMAGE_SIDES = (448, 672, 896, 1344)
"""Heights and widths of square images in pixels."""
IMAGE_COUNTS = (1, 8)
CASES = tuple(f"{count} × {side}²" if count > 1 else f"{side}²" for count in IMAGE_COUNTS for side in IMAGE_SIDES)
"""The choices of `--cases`."""
TOKENS_AROUND = 32
"""Text tokens before the images, and after them."""
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-7B": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "Qwen3-VL-8B": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
}
"""The language models, from the config.json of Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen3-VL-8B-Instruct."""
TOKEN_IDS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
"""From the same files."""


def cases_for(config: VisionConfig) -> list[Case]:
    """Return the inputs in the order of CASES."""
    counts_and_sides = [(count, side // config.patch_size) for count in IMAGE_COUNTS for side in IMAGE_SIDES]
    grids = [((1, side, side),) * count for count, side in counts_and_sides]
    return [Case(name, grid) for name, grid in zip(CASES, grids, strict=True)]


def check_text_layers(model: str, layers: int) -> None:
    """Check that a model can be built with this many text layers.

    Raises:
        ValueError: more than the model has, or fewer than the levels of DeepStack, which enter one layer each.
    """
    least = max(1, len(published_config(MODELS[model]).deepstack_visual_indexes))
    most = TEXT_CONFIGS[model]["num_hidden_layers"]
    if not least <= layers <= most:
        raise ValueError(f"--text-layers: expected {least} to {most} for {model}, got {layers}")


def official_config(model: str, text_layers: int) -> Any:
    """Return transformers' config of a model, with as many text layers as given.

    Raises:
        ValueError: the model cannot have this many text layers.
    """
    check_text_layers(model, text_layers)
    text = TEXT_CONFIGS[model] | {"num_hidden_layers": text_layers}
    return hf_config(published_config(MODELS[model]), text, TOKEN_IDS)


def hf_config(vision_config: VisionConfig, text: dict[str, Any], token_ids: Mapping[str, int]) -> Any:
    """Return transformers' config of a model whose text never ends by itself: all generate as much as they are told."""
    from transformers import AutoConfig

    vision = vision_config.to_hf()
    del vision["model_type"]
    text = text | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    configs = {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    return AutoConfig.for_model(vision_config.family, **configs, **token_ids)


def build_model(config: Any, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Build transformers' model with sdpa attention and seeded weights, in eval mode.

    The tower has the weights of `seed_weights`, the language model transformers' own initialisation.
    """
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    seed_weights(model.model.visual, seed=0)
    return model.eval()


def prompt(model: nn.Module, config: VisionConfig, case: Case) -> dict[str, Tensor]:
    """Return the inputs of one prompt on the model's device, as a processor returns them: text, all images, text."""
    ids, device = model.config, model.device
    generator = torch.Generator().manual_seed(0)
    smallest_special = min(getattr(ids, name) for name in TOKEN_IDS)
    before, after = torch.randint(smallest_special, (2, TOKENS_AROUND), generator=generator).tolist()
    images = []
    for t, h, w in case.grid:
        placeholders = [ids.image_token_id] * (t * h * w // config.merge_unit)
        images += [ids.vision_start_token_id, *placeholders, ids.vision_end_token_id]
    input_ids = torch.tensor([[*before, *images, *after]], device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == ids.image_token_id).int(),
        "pixel_values": pixel_values(case, config, device, model.dtype),
        "image_grid_thw": case.grid_thw().to(device),
    }
