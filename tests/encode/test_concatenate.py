"""`Embeddings.concatenate`: skipped images keep their places."""

import pytest
import torch

from qwenvit.outputs import Embeddings
from support.towers import SMALL


def part(sizes, skipped=(), width=4, seed=0):
    """Return embeddings of images of `sizes` tokens a side, some skipped, with a DeepStack layer where any is left."""
    tokens = sum(size * size for size in sizes)
    packed, layer = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(seed))
    grid = torch.tensor([[1, 2 * size, 2 * size] for size in sizes], dtype=torch.int64).view(-1, 3)
    return Embeddings(packed, grid, [layer] if sizes else [], SMALL["qwen2_vl"], skipped=skipped)


@pytest.mark.parametrize(
    "parts",
    [
        [([1, 2, 3], [0, 2, 5])],
        [([1, 2], []), ([3], [0, 2]), ([], [0, 1]), ([2], [])],
        [([], [0]), ([2, 1], [1])],
        [([2, 1], [2]), ([], [0])],
        [([], [0]), ([], [0, 1])],
    ],
)
def test_concatenation_keeps_the_places_of_skipped_images(parts):
    embeddings = [part(*arguments, seed=seed) for seed, arguments in enumerate(parts)]
    for (sizes, skipped), one in zip(parts, embeddings, strict=True):
        assert len(one) == len(sizes) + len(skipped)
        assert [index for index, item in enumerate(one) if item is None] == list(skipped)
    whole = Embeddings.concatenate(embeddings)
    items = [item for one in embeddings for item in one]
    assert len(whole) == len(items)
    for item, expected in zip(whole, items, strict=True):
        assert (item is None) == (expected is None)
        if item is not None:
            assert item.grid == expected.grid
            assert torch.equal(item.tokens, expected.tokens)
            assert all(map(torch.equal, item.deepstack, expected.deepstack))
    assert torch.equal(whole.packed, torch.cat([one.packed for one in embeddings]))
    assert torch.equal(whole.grid_thw, torch.cat([one.grid_thw for one in embeddings]))
