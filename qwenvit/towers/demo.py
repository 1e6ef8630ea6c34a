"""The demo tower: tiny, with random weights made by code, for trying the package without a download."""

import math
import warnings
from typing import Any

import torch

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.towers.choose import Tower, tower_class
from qwenvit.towers.reference import ReferenceTower

NAME = "demo"
ANNOUNCEMENT = "model='demo' has random weights: shapes and plumbing are real, features are not"

CONFIG = VisionConfig(
    family="qwen3_vl",
    depth=4,
    hidden_size=128,
    intermediate_size=512,
    num_heads=2,
    out_hidden_size=256,
    hidden_act="gelu_pytorch_tanh",
    patch_size=16,
    num_position_embeddings=2304,
    deepstack_visual_indexes=(0, 1, 2),
)


def build_tower(impl: Impl, device: torch.device, dtype: torch.dtype | None) -> Tower:
    """Build the tower of `model="demo"`, with the same weights on every machine.

    Warns that the weights are random.

    Args:
        impl: `"reference"`, `"triton"` or `"auto"`, see `tower_class`.
        device: the device of the weights.
        dtype: the dtype of the weights; None for float32.

    Raises:
        ValueError: the tower cannot run on the device.
    """
    warnings.warn(ANNOUNCEMENT, stacklevel=4)
    with torch.device("meta"):
        tower = tower_class(impl, CONFIG, device)(CONFIG)
        parameters = ReferenceTower(CONFIG).state_dict()
    generator = torch.Generator("cpu").manual_seed(0)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # independent of torch's defaults
    tensors = {}
    for name, parameter in parameters.items():
        if "norm" in name:
            tensors[name] = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0, **fp32)
        else:
            scale = 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.02
            scale = 0.02 if name == "pos_embed.weight" else scale
            tensors[name] = torch.randn(parameter.shape, generator=generator, **fp32) * scale
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    tower.load_state_dict(tensors, strict=True, assign=True)
    return tower
