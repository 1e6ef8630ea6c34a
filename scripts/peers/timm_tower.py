"""timm's Qwen3 tower, compiled and in a CUDA graph."""

import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from e2e.cases import Case, picture_of
from e2e.timing import Outputs
from peers.towers import Call, Prepare, captured
from qwenvit.config.vision_config import VisionConfig

TIMM_TOWERS = {1024: "qwen3_vit_306m_enc", 1152: "qwen3_vit_416m_enc"}
"""Its towers by width, where it has them."""


def timm_tower(folder: Path, tower: nn.Module, config: VisionConfig) -> Prepare:
    """timm's tower with the same weights, as fast as it gets.

    Raises:
        ValueError: timm has no such tower.
    """
    if config.family != "qwen3_vl" or config.hidden_size not in TIMM_TOWERS:
        raise ValueError("timm has no such tower")
    sys.path.insert(0, str(folder))
    timm = importlib.import_module("timm")
    from timm.models.qwen3_vit import checkpoint_filter_fn_encoder

    model = timm.create_model(TIMM_TOWERS[config.hidden_size], pretrained=False, out_features=config.out_hidden_size)
    model.load_state_dict(checkpoint_filter_fn_encoder(dict(tower.state_dict()), model))
    model = model.to(tower.device, tower.dtype).eval()
    torch._dynamo.config.recompile_limit = 64  # one a size
    for block in model.blocks:
        block.compile(dynamic=False)

    def prepare(case: Case, pixels: Tensor) -> Call:
        if case.frames or len(case.grid) > 1:
            raise ValueError("timm takes one image")
        picture = picture_of(pixels, case, config)

        @torch.no_grad()
        def call() -> Outputs:
            return [model(picture)[0]]

        return captured(call)

    return prepare
