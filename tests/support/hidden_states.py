"""Hidden states of transformers' towers in reading order, by brute force."""

import torch
from torch import Tensor, nn

from qwenvit.config.vision_config import VisionConfig


def hidden_states(
    tower: nn.Module, config: VisionConfig, pixel_values: Tensor, grids: list[list[int]]
) -> list[list[Tensor]]:
    """Return the hidden states of each item: of each layer, `[frames, rows, columns, hidden_size]`.

    Layer 0 is the first block's input, layer k the output of the k-th block. Gradients flow if they are enabled.

    Args:
        tower: transformers' tower.
        config: its config.
        pixel_values: `[patches, C·T·P·P]`.
        grids: frame groups, rows and columns of patches of each item.
    """
    states: list[Tensor] = []
    hooks = [tower.blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))]
    hooks += [block.register_forward_hook(lambda _, __, out: states.append(out.clone())) for block in tower.blocks]
    try:
        tower(pixel_values, grid_thw=torch.tensor(grids, device=pixel_values.device))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(states) == config.depth + 1
    order = reading_order(config, grids)
    split = [layer[order].split([t * h * w for t, h, w in grids]) for layer in states]
    return [[layer[item].unflatten(0, grid) for layer in split] for item, grid in enumerate(grids)]


def reading_order(config: VisionConfig, grids: list[list[int]]) -> list[int]:
    """Return where the tower of transformers has each patch, items one after another, each in reading order."""
    merge = config.spatial_merge_size
    place, start = [], 0
    for frames, rows, columns in grids:
        for frame in range(frames):
            for row in range(rows):
                for column in range(columns):
                    block = row // merge * (columns // merge) + column // merge
                    inside = row % merge * merge + column % merge
                    place.append(start + frame * rows * columns + block * merge**2 + inside)
        start += frames * rows * columns
    if config.window_size is None:
        return place
    from transformers.vision_utils import get_vision_window_index

    window_index, _ = get_vision_window_index(torch.tensor(grids), merge, config.window_size, config.patch_size)
    window_place = {token: position for position, token in enumerate(window_index.tolist())}
    return [window_place[patch // merge**2] * merge**2 + patch % merge**2 for patch in place]
