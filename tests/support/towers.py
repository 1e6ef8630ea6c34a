"""Small towers of every family, and reference towers with the weights of transformers' towers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qwenvit.config.published import PUBLISHED
from qwenvit.config.vision_config import VisionConfig
from qwenvit.encoder import Encoder
from qwenvit.towers.fast import FastTower
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
"""A published config of each family."""

SMALL: dict[str, VisionConfig] = {
    family: replace(config, hidden_size=96, intermediate_size=192, num_heads=4, out_hidden_size=40)
    for family, config in FULL.items()
}
"""The same depth and structure with 4 narrow heads: narrower than the fast tower's kernels support."""

MIXED_GRIDS = [[1, 16, 26], [3, 4, 6], [1, 2, 2], [1, 10, 8], [2, 8, 8]]
"""Images and videos of awkward sizes: partial windows, one-token items, repeated lengths."""


def narrow(family: str, **changes: Any) -> VisionConfig:
    """Return a published config with two heads of the published width, which the fast tower's kernels support.

    Args:
        family: which family.
        changes: fields to replace. A changed `depth` moves full attention to the last block, and DeepStack to every
            second block from the first.
    """
    config = SMALL[family]
    width = 2 * FULL[family].head_dim
    middle = 200 if config.traits.gated_mlp else 4 * width  # 200 needs padding
    sizes: dict[str, Any] = {"hidden_size": width, "num_heads": 2, "intermediate_size": middle}
    if "depth" in changes and config.traits.windowed:
        sizes["fullatt_block_indexes"] = (changes["depth"] - 1,)
    if "depth" in changes and config.traits.deepstack:
        sizes["deepstack_visual_indexes"] = tuple(range(0, changes["depth"], 2))
    return replace(config, **sizes | changes)


def one_block(config: VisionConfig) -> VisionConfig:
    """Return the config of one block of full width, followed by DeepStack if the family has it."""
    deepstack = (0,) if config.deepstack_visual_indexes else ()
    return replace(config, depth=1, fullatt_block_indexes=(), deepstack_visual_indexes=deepstack)


def ours_from(hf_tower: nn.Module, config: VisionConfig) -> ReferenceTower:
    """Return the reference tower with the weights of a tower of transformers."""
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


def fast_encoder_on_gpu(config: VisionConfig, dtype: torch.dtype = torch.bfloat16) -> Encoder:
    """Return an encoder with the fast tower on the GPU, and seeded weights."""
    torch.manual_seed(0)
    tower = FastTower(config).to("cuda", dtype)
    tower.load_state_dict(ReferenceTower(config).state_dict())
    return Encoder(tower)


def random_pixels(patches: int, config: VisionConfig, seed: int = 0) -> Tensor:
    """Return pixel values distributed like those of normalized images, `[patches, C·T·P·P]` fp32."""
    return torch.randn(patches, config.patch_dim, generator=torch.Generator().manual_seed(seed))
