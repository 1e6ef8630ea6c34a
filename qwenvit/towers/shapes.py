"""The shapes of a tower's weights, from its config."""

from dataclasses import replace
from itertools import groupby

import torch

from qwenvit.config.vision_config import VisionConfig
from qwenvit.towers.reference import ReferenceTower


def weight_shapes(config: VisionConfig) -> dict[str, torch.Size]:
    """Return the shapes of the tower's state dict, by name and in its order.

    A tower of one block is built, on the meta device: blocks are alike, and so are DeepStack's mergers. So it takes a
    moment whatever the depth is, which may come from a broken config.
    """
    has_deepstack = bool(config.deepstack_visual_indexes)
    one_block = replace(
        config, depth=1, fullatt_block_indexes=(), deepstack_visual_indexes=(0,) if has_deepstack else ()
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ReferenceTower(one_block).state_dict().items()}
    counts = {"blocks": config.depth, "deepstack_mergers": len(config.deepstack_visual_indexes)}
    expanded: dict[str, torch.Size] = {}
    for part, names in groupby(shapes, key=lambda name: name.partition(".")[0]):
        first = list(names)
        for index in range(counts.get(part, 1)):
            expanded |= {name.replace(f"{part}.0.", f"{part}.{index}.", 1): shapes[name] for name in first}
    return expanded
