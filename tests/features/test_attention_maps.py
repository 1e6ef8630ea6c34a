"""Attention maps against the weights that transformers' eager attention computes, put into place by brute force."""

import importlib
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import vision_utils

import qwenvit.features.attention_maps as module
from common.hf_towers import build_tower
from qwenvit.encoder import Encoder
from qwenvit.features.attention_maps import attention_maps
from qwenvit.towers.fast import FastTower
from support.towers import SMALL, narrow, ours_from

FAMILIES = list(SMALL)
DEPTH, HEADS = 3, 4


def small(family):
    return narrow(family, depth=DEPTH, hidden_size=96, intermediate_size=192, num_heads=HEADS)


def picture(config, rows, columns, seed=0):
    side = config.patch_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows * side, columns * side, 3), generator=generator, dtype=torch.uint8)


def encoder_of(config, dtype=torch.float32):
    hf = build_tower(config, dtype=dtype)
    return hf, Encoder(ours_from(hf, config))


def transformers_maps(hf, config, pixels, grid, monkeypatch):
    """Return `[heads, patches, patches]` of each block, both in reading order; a segment's weights come at a time."""
    modeling = importlib.import_module(type(hf).__module__)
    eager, calls = modeling.eager_attention_forward, []

    def recording(*args, **kwargs):
        out, weights = eager(*args, **kwargs)
        calls.append(weights[0])
        return out, weights

    monkeypatch.setattr(modeling, "eager_attention_forward", recording)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        hf(pixels, grid_thw=grid)
    monkeypatch.undo()
    _, rows, columns = grid[0].tolist()
    places = [
        (top + row) * columns + left + column  # of the patches that transformers is given
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
        for row in range(2)
        for column in range(2)
    ]
    places = torch.tensor(places).unflatten(0, (-1, 4))
    if config.window_size is not None:
        index, _ = vision_utils.get_vision_window_index(grid, 2, config.window_size, config.patch_size)
        places = places[index]
    places, maps = places.flatten(), []
    for _ in range(config.depth):
        whole = torch.zeros(config.num_heads, len(places), len(places), dtype=calls[0].dtype)
        start = 0
        while start < len(places):
            part = calls.pop(0)
            where = places[start : start + part.shape[1]]
            whole[:, where[:, None], where] = part
            start += len(where)
        maps.append(whole)
    assert not calls
    return maps


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_every_patch_are_transformers_weights(family, monkeypatch):
    config = small(family)
    hf, enc = encoder_of(config)
    image = picture(config, 12, 18)  # with windows of 8 x 8 patches: whole ones and cut ones
    pixels, grid = enc.image_processor([image], min_pixels=1)
    assert grid.tolist() == [[1, 12, 18]]
    expected = transformers_maps(hf, config, pixels, grid, monkeypatch)
    found = attention_maps(enc, image, range(DEPTH), min_pixels=1)
    assert found.blocks == (0, 1, 2)
    assert found.heads == (0, 1, 2, 3)
    assert found.grid == (12, 18)
    assert found.queries == tuple((row, column) for row in range(12) for column in range(18))
    for ours, theirs in zip(found.maps, expected, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == (HEADS, 12 * 18, 12, 18)
        assert theirs.std() > 1e-4  # no uniform attention, which any order would match
        torch.testing.assert_close(ours.flatten(2), theirs, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours.sum((2, 3)), torch.ones(HEADS, 12 * 18))
    if config.window_size is not None:
        assert (found.maps[0][:, 0, 8:] == 0).all()
        assert (found.maps[0][:, 0, :8, :8] > 0).all()
        assert (found.maps[2] > 0).all()


@pytest.mark.parametrize("piece_bytes", [1, 3000, 2**27])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_chosen_blocks_heads_and_queries_are_those_of_all(family, piece_bytes, monkeypatch):
    config = small(family)
    _, enc = encoder_of(config)
    image = picture(config, 10, 12)
    every = attention_maps(enc, image, range(DEPTH), min_pixels=1)
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    queries = [(9, 11), (0, 3), (8, 0), (0, 3)]
    some = attention_maps(enc, image, (-1, 0, -1), (2, -4), queries, min_pixels=1)
    assert (some.blocks, some.heads, some.queries) == ((2, 0, 2), (2, 0), tuple(queries))
    for block, ours in zip(some.blocks, some.maps, strict=True):
        for head, maps in zip(some.heads, ours, strict=True):
            for (row, column), one in zip(queries, maps, strict=True):
                torch.testing.assert_close(one, every.maps[block][head, row * 12 + column], rtol=1e-5, atol=1e-7)


class LargestSoftmax(TorchDispatchMode):
    """Records the bytes of the largest result of a softmax."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._softmax.default:
            self.largest = max(self.largest, out.nbytes)
        return out


@pytest.mark.parametrize("piece_bytes", [1, 3000, 20_000, 2**27])
def test_no_piece_is_larger_than_its_bound(piece_bytes, monkeypatch):
    config = small("qwen3_vl")
    _, enc = encoder_of(config)
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    with LargestSoftmax() as found:
        attention_maps(enc, picture(config, 8, 8), (0,), min_pixels=1)
    one_row, whole = 64 * 4, HEADS * 64 * 64 * 4
    assert min(piece_bytes, whole) / 2 <= found.largest <= max(piece_bytes, one_row)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_probabilities_are_fp32_in_a_tower_of_16_bits(family, monkeypatch):
    """Given the tower's own rotated queries and keys, they are closer to the truth than transformers', in 16 bits."""
    config = small(family)
    image = picture(config, 8, 10)
    hf, enc = encoder_of(config)
    pixels, grid = enc.image_processor([image], min_pixels=1)
    truth = transformers_maps(hf, config, pixels, grid, monkeypatch)[0]
    hf, enc = encoder_of(config, torch.bfloat16)
    theirs = transformers_maps(hf, config, pixels, grid, monkeypatch)[0]
    (ours,) = attention_maps(enc, image, (0,), min_pixels=1).maps
    assert ours.dtype == torch.float32
    assert (ours.flatten(2) - truth).norm() < 0.95 * (theirs.float() - truth).norm()
    torch.testing.assert_close(ours.sum((2, 3)), torch.ones(HEADS, 80))


def test_probabilities_are_fp32_under_autocast():
    config = small("qwen2_5_vl")
    _, enc = encoder_of(config)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = attention_maps(enc, picture(config, 8, 10), (0,), min_pixels=1).maps
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum((2, 3)), torch.ones(HEADS, 80))  # in bfloat16 they are off by 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_maps_on_a_gpu_are_those_on_the_cpu(family, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which rounds the patch embedding to 10 bits
    config = small(family)
    _, enc = encoder_of(config)
    image = picture(config, 12, 18)
    expected = attention_maps(enc, image, range(DEPTH), min_pixels=1)
    enc.tower.to("cuda")
    found = attention_maps(enc, image, range(DEPTH), min_pixels=1)
    for ours, on_cpu, copied in zip(found.maps, expected.maps, found.cpu().maps, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(copied, on_cpu, rtol=1e-3, atol=1e-5)


def test_nothing_runs_after_the_deepest_block(monkeypatch):
    config = small("qwen3_vl")
    _, enc = encoder_of(config)
    ran = []
    for number, block in enumerate(enc.tower.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    attention_maps(enc, picture(config, 4, 4), (1,), min_pixels=1)
    assert ran == [0]
    enc.tower.requires_grad_()
    assert not attention_maps(enc, picture(config, 4, 4), min_pixels=1).maps[0].requires_grad


def test_a_large_result_is_announced_before_anything_is_computed(monkeypatch):
    config = small("qwen3_vl")
    _, enc = encoder_of(config)
    image = picture(config, 8, 8)
    size = 2 * HEADS * 64 * 64 * 4
    monkeypatch.setattr(module, "WARN_BYTES", size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_maps(enc, image, (0, 1), min_pixels=1)
    monkeypatch.setattr(module, "WARN_BYTES", size - 1)
    with pytest.warns(UserWarning, match=f"attention maps: {size / 2**30:.1f} GiB") as caught:
        attention_maps(enc, image, (0, 1), min_pixels=1)
    assert caught[0].filename == __file__
    monkeypatch.setattr(enc.tower, "embed", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="attention maps"):
            attention_maps(enc, image, (0, 1), min_pixels=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": (3,)}, ValueError, r"blocks: expected at least one, from -3 to 2, got \[3\]"),
        ({"blocks": (-4,)}, ValueError, "blocks: expected at least one"),
        ({"blocks": ()}, ValueError, "blocks: expected at least one"),
        ({"blocks": 2}, TypeError, "blocks: expected a sequence of integers, got 2"),
        ({"blocks": (1.0,)}, TypeError, "blocks: expected a sequence of integers"),
        ({"heads": (0, 4)}, ValueError, r"heads: expected at least one, from -4 to 3, got \[0, 4\]"),
        ({"queries": [(0, 0), (4, 0)]}, ValueError, r"queries: .* in a grid of 4 × 6 patches, got \(4, 0\)"),
        ({"queries": [(0, -1)]}, ValueError, "queries: expected"),
        ({"queries": [(0, 0, 0)]}, ValueError, "queries: expected"),
        ({"queries": (0, 0)}, TypeError, r"queries: expected \(row, column\) of patches, got 0"),
        ({"queries": 5}, TypeError, r"queries: expected a sequence of \(row, column\) of patches, got 5"),
        ({"queries": []}, ValueError, "queries: expected at least one patch"),
        ({"max_patches": 3}, TypeError, "options: expected only"),
    ],
)
def test_impossible_arguments_are_refused(arguments, error, message):
    config = small("qwen3_vl")
    _, enc = encoder_of(config)
    with pytest.raises(error, match=message):
        attention_maps(enc, picture(config, 4, 6), **{"min_pixels": 1} | arguments)


def test_the_fast_tower_is_refused():
    config = narrow("qwen3_vl", depth=1)
    enc = Encoder(FastTower(config, impl="reference"))
    with pytest.raises(ValueError, match="load it with impl='reference'"):
        attention_maps(enc, picture(config, 4, 6))
