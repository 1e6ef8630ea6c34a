"""Seeded weights of a whole model under the names of its checkpoint: the same in every process on one kind of GPU."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.hf_towers import build_tower
from qwenvit.config.vision_config import VisionConfig

EMBEDDING_GAIN = 6.0
"""How much larger than the rest the weights are from tokens and to them: otherwise all tokens are equally likely."""


def seeded_tower(config: VisionConfig, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Return transformers' tower with the weights that every engine gets.

    They are drawn in fp32 and then rounded, also where vLLM has made another dtype torch's default.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device(device):
            return build_tower(config, dtype=dtype, device=device)
    finally:
        torch.set_default_dtype(default)


def seeded_weights(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the model in a folder, as its safetensors files would: the tower's first, then the text's.

    The tower has the weights of `seed_weights`. Those of the language model keep activations near 1, so that the
    log-probabilities depend on the images.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    config: Any = AutoConfig.from_pretrained(folder)
    tower = seeded_tower(VisionConfig.from_hf(config.to_dict()), dtype, device)
    for name, parameter in tower.named_parameters():
        yield f"model.visual.{name}", parameter.detach()
    del tower
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if ".visual." not in name:
            yield name, draw(name, parameter.shape, dtype, device)


def draw(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Draw one tensor of the language model, seeded by its name."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    empty = torch.empty(shape, dtype=dtype, device=device)
    if len(shape) == 1:
        return empty.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)
    gain = EMBEDDING_GAIN if "lm_head" in name or "embed_tokens" in name else 1.0
    return empty.normal_(0.0, gain * shape[1] ** -0.5, generator=generator)
