"""Hidden states from CUDA graphs: the bits of the eager tower, beside the graphs of whole passes."""

import threading

import pytest
import torch

from qwenvit.graphs.capacity import MAX_GRAPH_PATCHES
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.reading_order import reading_order
from qwenvit.towers.hidden_states import ordered_hidden_states
from support.towers import FULL, MIXED_GRIDS, fast_encoder_on_gpu, narrow, random_pixels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
LAYERS = (-1, 0, 2, 2)


def encoder(family="qwen2_5_vl", dtype=torch.bfloat16):
    middle = {"intermediate_size": 512} if FULL[family].traits.gated_mlp else {}
    config = narrow(family, depth=4, out_hidden_size=64, **middle)
    return fast_encoder_on_gpu(config, dtype)


def pixels_of(grid, enc, seed=0):
    patches = int(torch.tensor(grid).prod(1).sum())
    return random_pixels(patches, enc.config, seed).to("cuda", enc.dtype)


def eager(enc, grid, pixels):
    """Return the hidden states of `LAYERS` without a graph, packed and in reading order."""
    plan = GridPlan.build(grid, enc.config, "cuda")
    order = reading_order(torch.tensor(grid), enc.config).to("cuda")
    first, middle, last = ordered_hidden_states(enc.tower, pixels, plan, (0, 2, 4), order)
    return [last, first, middle, middle]


def packed(features, enc):
    return [torch.cat([one.reshape(-1, enc.config.hidden_size) for one in maps]) for maps in features]


def check(enc, grid, pixels, features):
    found = packed(zip(*(item.maps for item in features), strict=True), enc)
    for layer, ours, expected in zip(LAYERS, found, eager(enc, grid, pixels), strict=True):
        assert torch.equal(ours, expected), (grid, layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_from_a_graph_have_the_bits_of_the_eager_tower(family, dtype):
    """In a graph that is shared, in a graph of its own, and after other grids went through both."""
    enc, results = encoder(family, dtype), []
    other = [[1, 44, 44]]
    enc.features_of_pixels(pixels_of(other, enc), torch.tensor(other), LAYERS)
    for seed, grid in enumerate(([[1, 20, 26]], MIXED_GRIDS, [[1, 20, 26]], [[1, 30, 28], [3, 4, 6]]) * 3):
        pixels = pixels_of(grid, enc, seed)
        results.append((grid, pixels, enc.features_of_pixels(pixels, torch.tensor(grid), LAYERS)))
    assert {key.layers for key in enc.tower.graphs._graphs} == {(0, 2, 4)}
    for result in results:
        check(enc, *result)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_whole_passes_do_not_disturb_one_another(family):
    """They share a memory pool: each result is copied out before the next replay."""
    enc, grid = encoder(family), [[1, 34, 32], [2, 8, 6]]
    expected, results = {}, []
    for seed in range(2):
        pixels = pixels_of(grid, enc, seed)
        expected[seed] = enc.tower(pixels, GridPlan.build(grid, enc.config, "cuda"))
    for seed in (0, 1, 1, 0, 1, 0):
        pixels = pixels_of(grid, enc, seed)
        output = enc(pixels, torch.tensor(grid))
        features = enc.features_of_pixels(pixels, torch.tensor(grid), LAYERS)
        enc.features_of_pixels(pixels * 2, torch.tensor(grid), (1,))
        results.append((seed, pixels, output, features))
    for seed, pixels, output, features in results:
        assert torch.equal(output.pooler_output, expected[seed].pooler_output)
        assert torch.equal(output.last_hidden_state, expected[seed].last_hidden_state)
        for ours, theirs in zip(output.deepstack_features, expected[seed].deepstack_features, strict=True):
            assert torch.equal(ours, theirs)
        check(enc, grid, pixels, features)


@pytest.mark.parametrize("what", ["patches", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_item_alone_has_the_bits_of_the_item_in_a_batch(family, what):
    enc = encoder(family)
    if not enc.is_batch_invariant():
        pytest.skip("needs a Hopper GPU")
    pixels, options = pixels_of(MIXED_GRIDS, enc), {"what": what, "norm": True}
    together = enc.features_of_pixels(pixels, torch.tensor(MIXED_GRIDS), (0, 1, -1), **options)
    parts = pixels.split([t * h * w for t, h, w in MIXED_GRIDS])
    for grid, part, item in zip(MIXED_GRIDS, parts, together, strict=True):
        (alone,) = enc.features_of_pixels(part, torch.tensor([grid]), (0, 1, -1), **options)
        assert all(map(torch.equal, alone.maps, item.maps))


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_means_of_tokens_on_the_gpu(family):
    """Against plain torch in fp64, on the maps without either."""
    enc, grid = encoder(family), [[1, 10, 14], [1, 4, 6]]
    pixels, sizes = pixels_of(grid, enc), torch.tensor(grid)
    raw = enc.features_of_pixels(pixels, sizes)
    normed = enc.features_of_pixels(pixels, sizes, norm=True)
    tokens = enc.features_of_pixels(pixels, sizes, what="tokens")
    norm = enc.tower.merger.norm
    for plain, with_norm, by_token in zip(raw, normed, tokens, strict=True):
        wide = plain.maps[0].double()
        blocks = wide.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).mean((1, 3))
        torch.testing.assert_close(by_token.maps[0].double(), blocks, rtol=1e-2, atol=1e-3)
        if norm.bias is None:
            truth = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
        else:
            truth = torch.nn.functional.layer_norm(
                wide, wide.shape[-1:], norm.weight.double(), norm.bias.double(), 1e-6
            )
        torch.testing.assert_close(with_norm.maps[0].double(), truth, rtol=2e-2, atol=2e-2)


def test_images_go_through_the_pipeline():
    """Uploads, the tower and the caller are on streams of their own; the caller's stream waits for the maps."""
    enc = encoder("qwen3_vl")
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, 64 + 32 * i, 96), generator=generator, dtype=torch.uint8) for i in range(7)]
    for _ in range(3):
        for image, found in zip(images, enc.features(images, LAYERS, channels="first"), strict=True):
            pixels, grid = enc.image_processor(image, channels="first")
            (alone,) = enc.features_of_pixels(pixels, grid, LAYERS)
            for ours, expected in zip(found.maps, alone.maps, strict=True):
                assert ours.is_cuda
                torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


def test_warmup_captures_what_later_calls_use():
    enc = encoder()
    count = enc.warmup(300, layers=LAYERS)
    graphs = set(enc.tower.graphs._graphs)
    assert len(graphs) == count + 1  # and the one that sizes the pool
    for side in range(2, 36, 2):
        enc.features_of_pixels(pixels_of([[1, side, side]], enc), torch.tensor([[1, side, side]]), LAYERS)
    assert set(enc.tower.graphs._graphs) == graphs
    with pytest.raises(ValueError, match="layers: expected at least one, from -5 to 4"):
        enc.warmup(300, layers=(5,))


def test_weights_that_move():
    enc, grid = encoder(), [[1, 8, 8]]
    pixels = pixels_of(grid, enc)
    for _ in range(3):
        check(enc, grid, pixels, enc.features_of_pixels(pixels, torch.tensor(grid), LAYERS))
        weight = enc.tower.blocks[1].attn.qkv.weight
        weight.data = weight.data * 2
        torch.cuda.empty_cache()
    handle = enc.tower.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no forward hooks"):
        enc.features_of_pixels(pixels, torch.tensor(grid), LAYERS)
    handle.remove()
    check(enc, grid, pixels, enc.features_of_pixels(pixels, torch.tensor(grid), LAYERS))


def test_threads_and_streams_are_serialized():
    enc, grids = encoder(), [[[1, 16, 16]], [[2, 8, 16]], [[1, 12, 20]], [[1, 4, 4]] * 9]
    results, failures = {}, []

    def work(number):
        try:
            stream, grid = torch.cuda.Stream(), grids[number % 4]
            with torch.cuda.stream(stream), torch.inference_mode(number % 2 == 0):
                for turn in range(8):
                    pixels = pixels_of(grid, enc, 100 * number + turn)
                    enc(pixels, torch.tensor(grid))
                    results[number, turn] = grid, pixels, enc.features_of_pixels(pixels, torch.tensor(grid), LAYERS)
                stream.synchronize()
        except Exception as error:  # noqa: BLE001  (nobody would see a thread's exception)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    torch.cuda.synchronize()
    assert len(results) == 48
    for grid, pixels, features in results.values():
        check(enc, grid, pixels.clone(), features)


def test_batches_too_large_for_a_graph():
    enc, grid = encoder(), [[1, 200, 200]]
    pixels = pixels_of(grid, enc)
    assert len(pixels) > MAX_GRAPH_PATCHES
    check(enc, grid, pixels, enc.features_of_pixels(pixels, torch.tensor(grid), LAYERS))
    check(enc, grid, pixels, enc.features_of_pixels(pixels.cpu(), torch.tensor(grid), LAYERS))
    assert not enc.tower.graphs._graphs


def test_gradients_are_refused():
    enc = encoder()
    with pytest.raises(ValueError, match="pixel_values, parameters: expected none"):
        enc.features_of_pixels(pixels_of([[1, 4, 4]], enc).requires_grad_(), torch.tensor([[1, 4, 4]]))


def test_rising_sizes_take_no_more_memory_than_the_largest():
    """The pool is sized for the copies of layers before smaller graphs are captured."""

    def held(sizes):
        enc = encoder()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for layers in ((0,), (-1,), (0, 1, 2, -1)):
            for side in sizes:
                for _ in range(2):  # the second time in a row, its capacity has a graph of its own
                    enc.features_of_pixels(pixels_of([[1, side, side]], enc), torch.tensor([[1, side, side]]), layers)
        enc(pixels_of([[1, 8, 8]], enc), torch.tensor([[1, 8, 8]]))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    held([12])  # cuBLAS' workspaces, which stay
    assert held(range(12, 182, 12)) <= held([180]) + 60 * 2**20  # a pool that grows takes the next power of two
