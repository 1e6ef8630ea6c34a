"""CUDA graphs of the fast tower: capacities, and any layout through any graph."""

import contextlib
import copy
import gc
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from towers import FULL, random_pixels

from qwenvit import Encoder
from qwenvit.device_plan import Capacity
from qwenvit.fast import FastTower
from qwenvit.graphs import MOST_PATCHES, GraphedTower, capacity_for
from qwenvit.grid import GridPlan
from qwenvit.reference import ReferenceTower

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SAME_TOTAL = ([[1, 8, 32]], [[1, 32, 8]], [[1, 16, 16]], [[4, 8, 8]], [[1, 8, 8], [2, 12, 8]], [[1, 2, 2]] * 64)


@given(st.integers(1, 2**15), st.integers(1, 900), st.integers(0, 9000), st.integers(1, 900), st.integers(1, 3000))
def test_a_capacity_covers_what_is_needed_and_little_more(tokens, frames, windows, items, side):
    need = Capacity(4 * tokens, frames, windows, items, side)
    room = capacity_for(need, 4)
    for name in ("patches", "frames", "windows", "items", "side"):
        assert getattr(room, name) >= getattr(need, name)
    assert room.patches % 4 == 0
    assert room.patches - need.patches < max(16, need.patches / 32)
    assert capacity_for(replace(need, patches=room.patches, frames=room.frames, items=room.items), 4) == room
    assert room.windows <= max(2 * windows, room.patches // 48 + 16)


def encoder(family="qwen2_5_vl", dtype=torch.bfloat16):
    config = FULL[family]
    width = 2 * config.head_dim
    middle = 512 if config.traits.gated_mlp else 4 * width
    blocks = {"fullatt_block_indexes": (3,)} if config.traits.windowed else {}
    blocks |= {"deepstack_visual_indexes": (0, 2)} if config.traits.deepstack else {}
    shape = {"depth": 4, "hidden_size": width, "num_heads": 2, "intermediate_size": middle, "out_hidden_size": 64}
    config = replace(config, **shape, **blocks)
    torch.manual_seed(0)
    tower = FastTower(config).to("cuda", dtype)
    tower.load_state_dict(ReferenceTower(config).state_dict())
    return Encoder(tower)


def pixels_of(grid, enc, seed=0):
    patches = int(torch.tensor(grid).prod(1).sum())
    return random_pixels(patches, enc.config, seed).to("cuda", enc.dtype)


def check(enc, grid, pixels, output):
    expected = enc.tower(pixels, GridPlan.build(grid, enc.config, "cuda"))
    assert torch.equal(output.pooler_output, expected.pooler_output), grid
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state), grid
    for ours, theirs in zip(output.deepstack_features, expected.deepstack_features, strict=True):
        assert torch.equal(ours, theirs), grid


@needs_gpu
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_layouts_of_equal_size_are_not_confused(family):
    """One capacity, one graph, and results that a later call leaves alone. 256 patches: no room is to spare."""
    enc = encoder(family)
    outputs = []
    for seed, grid in enumerate(SAME_TOTAL * 2):
        pixels = pixels_of(grid, enc, seed)
        outputs.append((grid, pixels, enc(pixels, torch.tensor(grid))))
    for grid, pixels, output in outputs:
        check(enc, grid, pixels, output)


@needs_gpu
def test_room_to_spare_changes_nothing_that_counts():
    """Matrix products of another height may sum in another order; in fp32 that is seen to be all."""
    enc = encoder(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for seed in range(25):
        count = int(torch.randint(1, 5, (), generator=generator))
        grid = torch.randint(1, 12, (count, 3), generator=generator) * torch.tensor([0, 2, 2])
        grid[:, 0] = torch.randint(1, 4, (count,), generator=generator)
        pixels = pixels_of(grid.tolist(), enc, seed)
        output, expected = enc(pixels, grid), enc.tower(pixels, GridPlan.build(grid, enc.config, "cuda"))
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_threads_and_streams_take_turns():
    enc = encoder()
    grids = [[[1, 16, 16]], [[2, 8, 16]], [[1, 12, 20]], [[1, 4, 4]] * 9]
    results, failures = {}, []

    def work(number):
        try:
            stream = torch.cuda.Stream()
            grid = grids[number % 4]
            with torch.cuda.stream(stream), torch.inference_mode(number % 2 == 0):
                for round_number in range(8):
                    pixels = pixels_of(grid, enc, 100 * number + round_number)
                    results[number, round_number] = (grid, pixels, enc(pixels, torch.tensor(grid)))
                stream.synchronize()
        except Exception as error:  # noqa: BLE001  (a thread's exception would go unseen)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    torch.cuda.synchronize()
    assert len(results) == 48
    for grid, pixels, output in results.values():
        expected = enc(pixels.clone(), torch.tensor(grid))
        assert torch.equal(output.pooler_output, expected.pooler_output)


@needs_gpu
def test_a_tower_that_was_converted_gets_new_graphs():
    enc = encoder()
    pixels = pixels_of([[1, 8, 8]], enc)
    assert enc(pixels, torch.tensor([[1, 8, 8]])).pooler_output.dtype == torch.bfloat16
    enc.tower.float()
    output = enc(pixels, torch.tensor([[1, 8, 8]]))
    assert output.pooler_output.dtype == torch.float32
    check(enc, [[1, 8, 8]], pixels.float(), output)


@needs_gpu
def test_a_weight_that_lies_elsewhere_is_read_there():
    """Its old memory stays readable: graphs are launched before anything is looked at."""
    enc, grid = encoder(), [[1, 8, 8]]
    pixels = pixels_of(grid, enc)
    enc(pixels, torch.tensor(grid))
    weight = enc.tower.blocks[1].attn.qkv.weight
    weight.data = weight.data * 2
    torch.cuda.empty_cache()
    check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))
    weight.mul_(0.5)
    check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))
    enc.tower.blocks[1].attn.proj.weight.requires_grad_()
    with pytest.raises(ValueError, match="gives no gradients"):
        enc(pixels, torch.tensor(grid))


@needs_gpu
def test_graphs_are_the_towers():
    """Encoders of one tower share them, and they hold no memory of a tower that has left the GPU."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    enc, grid = encoder(), [[1, 64, 64]]
    pixels = pixels_of(grid, enc)
    expected = enc(pixels, torch.tensor(grid)).pooler_output.clone()
    graphs = enc.tower.graphs
    assert torch.equal(Encoder(enc.tower)(pixels, torch.tensor(grid)).pooler_output, expected)
    assert enc.tower.graphs is graphs
    enc.tower.cpu()
    del graphs, pixels, expected
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 40 * 2**20  # cuBLAS keeps room to work in


def test_graphs_hold_no_reference_to_themselves(monkeypatch):
    """Or their memory would stay until Python's collector of cycles comes by."""
    cuda = SimpleNamespace(device=contextlib.nullcontext, Stream=Mock(), Event=Mock(), graph_pool_handle=Mock())
    monkeypatch.setattr(torch, "cuda", cuda)
    config = replace(FULL["qwen2_vl"], depth=1, hidden_size=160, num_heads=2, intermediate_size=320, out_hidden_size=8)
    tower = FastTower(config)
    tower.graphs = GraphedTower(tower)
    watched = weakref.ref(tower.graphs)
    gc.disable()
    try:
        tower.graphs = None
        assert watched() is None
        tower.graphs, alive = GraphedTower(tower), weakref.ref(tower)
        del tower
        assert alive() is None
    finally:
        gc.enable()


@needs_gpu
def test_a_copy_has_graphs_of_its_own():
    enc = encoder()
    grid = [[1, 8, 8]]
    pixels = pixels_of(grid, enc)
    before = enc(pixels, torch.tensor(grid))
    other = copy.deepcopy(enc)
    for parameter in other.tower.parameters():
        parameter.mul_(0.5)
    check(other, grid, pixels, other(pixels, torch.tensor(grid)))
    assert torch.equal(enc(pixels, torch.tensor(grid)).pooler_output, before.pooler_output)


@needs_gpu
def test_warmup_captures_what_later_calls_use():
    enc = encoder()
    count = enc.warmup(300)
    assert count == len(enc.tower.graphs._graphs)
    for side in range(2, 36, 2):
        enc(pixels_of([[1, side, side]], enc), torch.tensor([[1, side, side]]))
    assert len(enc.tower.graphs._graphs) == count
    with pytest.raises(ValueError, match=f"max_tokens: expected at most {MOST_PATCHES // 4}"):
        enc.warmup(10**6)
    with pytest.raises(ValueError, match="max_tokens: expected a positive number of tokens, got 0"):
        enc.warmup(0)


@needs_gpu
def test_batches_beyond_every_graph():
    enc = encoder()
    grid = [[1, 200, 200]]
    pixels = pixels_of(grid, enc)
    check(enc, grid, pixels, enc(pixels, torch.tensor(grid)))
    assert not enc.tower.graphs._graphs


@needs_gpu
def test_gradients_are_refused():
    enc = encoder()
    with pytest.raises(ValueError, match="pixel_values: the fast tower gives no gradients"):
        enc(pixels_of([[1, 4, 4]], enc).requires_grad_(), torch.tensor([[1, 4, 4]]))


def test_the_reference_tower_has_nothing_to_warm_up():
    config = replace(FULL["qwen2_vl"], depth=1, hidden_size=160, num_heads=2, intermediate_size=320, out_hidden_size=8)
    assert Encoder(ReferenceTower(config)).warmup(1000) == 0
