"""timm's Qwen3 tower, each block compiled, in a CUDA graph."""

import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from common.tower_inputs import Case, Outputs, PrepareCall, TowerCall, picture_of
from peers.cuda_graph import capture
from qwenvit.config.vision_config import VisionConfig

TIMM_MODELS = {1024: "qwen3_vit_306m_enc", 1152: "qwen3_vit_416m_enc"}
"""timm's model names by hidden size."""


def timm_tower(folder: Path, tower: nn.Module, config: VisionConfig) -> PrepareCall:
    """Load timm from a folder and build its tower with the weights of transformers' tower.

    Raises:
        ValueError: timm has no tower of this config.
    """
    if config.family != "qwen3_vl" or config.hidden_size not in TIMM_MODELS:
        raise ValueError("timm has no such tower")
    sys.path.insert(0, str(folder))
    timm = importlib.import_module("timm")
    from timm.models.qwen3_vit import checkpoint_filter_fn_encoder

    model = timm.create_model(TIMM_MODELS[config.hidden_size], pretrained=False, out_features=config.out_hidden_size)
    model.load_state_dict(checkpoint_filter_fn_encoder(dict(tower.state_dict()), model))
    model = model.to(tower.device, tower.dtype).eval()
    torch._dynamo.config.recompile_limit = 64  # each image size compiles once
    for block in model.blocks:
        block.compile(dynamic=False)

    def prepare(case: Case, pixels: Tensor) -> TowerCall:
        if case.frames or len(case.grid) > 1:
            raise ValueError("timm takes one image")
        picture = picture_of(pixels, case, config)

        @torch.no_grad()
        def call() -> Outputs:
            return [model(picture)[0]]

        return capture(call)

    return prepare
