"""transformers' image processor, on the CPU or on the GPU, as its users call it: one image after another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.torchvision_cpu import define_torchvision_schemas

define_torchvision_schemas()  # before transformers imports torchvision


def build_processor(settings: Mapping[str, Any]) -> Any:
    """Return the torchvision processor that transformers builds from a `preprocessor_config.json`."""
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor.from_dict(dict(settings))


def process(processor: Any, path: Path, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Open an image file; return `pixel_values` `[patches, C·T·P·P]` float32 on the device, and `image_grid_thw`.

    Args:
        processor: from `build_processor`.
        path: the file. Pillow decodes it.
        device: where the processor resizes, normalises and cuts.
    """
    batch = processor(images=[Image.open(path)], return_tensors="pt", device=device)
    return batch["pixel_values"], batch["image_grid_thw"]
