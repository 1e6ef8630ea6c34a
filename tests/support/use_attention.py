"""Models, towers and inputs for the tests of use_attention, and what they compare."""

import functools

import torch

from common.hf_towers import build_tower, seed_weights
from qwenvit.parity import close
from support.tiny_models import build, visual
from support.towers import MIXED_GRIDS, narrow, random_pixels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = MIXED_GRIDS if DEVICE == "cuda" else [[1, 8, 10], *MIXED_GRIDS[1:3]]  # the interpreter is slow
BATCHES = {
    "an image": [[("text", 3), ("image", (1, 6, 10)), ("text", 4)]],
    "a video": [[("text", 3), ("video", (3, 4, 6)), ("text", 4)]],
    "both": [
        [("text", 2), ("image", (1, 4, 4)), ("text", 3), ("video", (2, 4, 4)), ("text", 1)],
        [("text", 2), ("image", (1, 6, 4)), ("text", 3), ("image", (1, 8, 2)), ("text", 1)],
    ],
}


@functools.cache
def build_wide(family):
    """Return a tiny model whose vision tower has two blocks of two heads as wide as those of published towers."""
    model = build(family, depth=2, **{"embed_dim" if family == "qwen2_vl" else "hidden_size": 128})
    seed_weights(visual(model), seed=0, outliers=False)
    return model


def tower_inputs(config, grids=GRIDS):
    grid_thw = torch.tensor(grids)
    return random_pixels(int(grid_thw.prod(1).sum()), config).to(DEVICE), grid_thw.to(DEVICE)


def tiny_tower(family="qwen3_vl"):
    """Return a tower of two blocks in fp32, and its inputs."""
    config = narrow(family, depth=2)
    return build_tower(config, device=DEVICE), tower_inputs(config, [[1, 4, 6], [2, 4, 4]])


def implementations(model):
    """Return the name of the attention in every config of a model."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    return [(type(config).__name__, config._attn_implementation) for config in configs]


def assert_close(actual, expected):
    check = close("with use_attention", actual, expected)
    assert check.passed, check
