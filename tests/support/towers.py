"""Small towers of every family, and ours loaded with the weights of transformers'."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from qwenvit.config.published import PUBLISHED
from qwenvit.config.vision_config import VisionConfig
from qwenvit.towers.reference import ReferenceTower
from qwenvit.weights.names import official_name

FULL: dict[str, VisionConfig] = {
    family: PUBLISHED[name].config
    for family, name in {
        "qwen2_vl": "qwen2_vl-7b",
        "qwen2_5_vl": "qwen2_5_vl-7b",
        "qwen2_5_omni": "qwen2_5_omni-7b",
        "qwen3_vl": "qwen3_vl-8b",
        "qwen3_omni": "qwen3_omni-30b-a3b",
        "qwen3_5": "qwen3_5-9b",
    }.items()
}
"""A published config of every family."""

SMALL: dict[str, VisionConfig] = {
    family: replace(config, hidden_size=96, intermediate_size=192, num_heads=4, out_hidden_size=40)
    for family, config in FULL.items()
}
"""The same depth and structure, narrow."""

MIXED_GRIDS = [[1, 16, 26], [3, 4, 6], [1, 2, 2], [1, 10, 8], [2, 8, 8]]
"""Images and videos of awkward sizes: partial windows, one-token items, repeated lengths."""


def one_block(config: VisionConfig) -> VisionConfig:
    """Full width, one block, with DeepStack after it where there is any."""
    deepstack = (0,) if config.deepstack_visual_indexes else ()
    return replace(config, depth=1, fullatt_block_indexes=(), deepstack_visual_indexes=deepstack)


def ours_from(hf_tower: nn.Module, config: VisionConfig) -> ReferenceTower:
    """The reference tower with the very weights of a tower of transformers."""
    official = hf_tower.state_dict()
    dtype = next(hf_tower.parameters()).dtype
    with torch.device("meta"):
        tower = ReferenceTower(config)
    names = {name: official_name(name, config.family) for name in tower.state_dict()}
    assert set(names.values()) == set(official)
    weights = {name: official[source].clone() for name, source in names.items()}
    tower.load_state_dict(weights, strict=True, assign=True)
    assert next(tower.parameters()).dtype == dtype
    return tower.eval()


def random_pixels(patches: int, config: VisionConfig, seed: int = 0) -> Tensor:
    """Pixel values as normalised images have them, `[patches, C·T·P·P]` fp32."""
    return torch.randn(patches, config.patch_dim, generator=torch.Generator().manual_seed(seed))
