"""Maps of hidden states against transformers' own hidden states, put in reading order by loops."""

import gc
import weakref

import numpy as np
import pytest
import torch

from common.hf_towers import build_tower
from qwenvit import Encoder, ItemFeatures
from qwenvit.features import encoder_methods
from qwenvit.features.maps import check_layers
from qwenvit.parity import close
from qwenvit.preprocess import image_processor
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.hidden_states import hidden_states
from support.towers import MIXED_GRIDS, SMALL, narrow, ours_from, random_pixels

FAMILIES = list(SMALL)
PATCHES = sum(t * h * w for t, h, w in MIXED_GRIDS)


def mean_of_tokens(states):
    """Average 2 x 2 patches of `[frames, rows, columns, width]` in fp32."""
    wide = states.float()
    total = wide[:, ::2, ::2] + wide[:, ::2, 1::2] + wide[:, 1::2, ::2] + wide[:, 1::2, 1::2]
    return (total / 4).to(states.dtype)


def noise(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def demo():
    with pytest.warns(UserWarning, match="random weights"):
        return Encoder.from_pretrained("demo", device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_transformers_hidden_states_in_reading_order(family, dtype):
    """Every layer, with no difference in any bit."""
    config = narrow(family, depth=6)
    hf = build_tower(config, dtype=dtype)
    enc, pixels, grid = Encoder(ours_from(hf, config)), random_pixels(PATCHES, config), torch.tensor(MIXED_GRIDS)
    with torch.no_grad():
        truth = hidden_states(hf, config, pixels, MIXED_GRIDS)
        norm = hf.merger.ln_q if hasattr(hf.merger, "ln_q") else hf.merger.norm
        layers = (*range(config.depth, -1, -1), -1, 0)
        asked = {
            (what, norm): enc.features_of_pixels(pixels, grid, layers, what=what, norm=norm)
            for what in ("patches", "tokens")
            for norm in (False, True)
        }
        for item, (frames, rows, columns) in enumerate(MIXED_GRIDS):
            for (what, normed), features in asked.items():
                found = features[item]
                assert found.layers == (*range(config.depth, -1, -1), config.depth, 0)
                side = 2 if what == "tokens" else 1
                assert found.grid == (frames, rows // side, columns // side)
                assert found.is_video == (frames > 1)
                for layer, ours in zip(found.layers, found.maps, strict=True):
                    expected = norm(truth[item][layer]) if normed else truth[item][layer]
                    expected = mean_of_tokens(expected) if what == "tokens" else expected
                    assert ours.dtype == dtype
                    assert torch.equal(ours, expected if frames > 1 else expected[0]), (layer, what, normed)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_the_fast_tower_pass_the_gate(family):
    """Blocks work in place: a layer that is not copied in time would be a deeper one."""
    config = narrow(family, depth=6)
    hf = build_tower(config)
    fast = FastTower(config, impl="reference")
    fast.load_state_dict(ours_from(hf, config).state_dict())
    pixels, layers = random_pixels(PATCHES, config), tuple(range(7))
    with torch.no_grad():
        truth = hidden_states(hf, config, pixels, MIXED_GRIDS)
        features = Encoder(fast).features_of_pixels(pixels, torch.tensor(MIXED_GRIDS), layers)
    for item, found in enumerate(features):
        for layer, ours in zip(found.layers, found.maps, strict=True):
            assert close(f"layer {layer}", ours.reshape(truth[item][layer].shape), truth[item][layer]).passed, layer


def test_the_tower_stops_after_the_deepest_layer():
    config = narrow("qwen3_vl", depth=6)
    for tower in (ReferenceTower(config), FastTower(config, impl="reference")):
        tower.load_state_dict(ReferenceTower(config).state_dict())
        called = []
        for name, module in tower.named_modules():
            module.register_forward_hook(lambda *_, name=name, called=called: called.append(name))
        enc = Encoder(tower)
        enc.features_of_pixels(random_pixels(16, config), torch.tensor([[1, 4, 4]]), (1, 3))
        assert {name for name in called if name.startswith("blocks.") and name.count(".") == 1} == {
            "blocks.0",
            "blocks.1",
            "blocks.2",
        }
        assert not [name for name in called if "merger" in name]
        enc.features_of_pixels(random_pixels(16, config), torch.tensor([[1, 4, 4]]), (0,))
        assert called.count("blocks.0") == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_several_sizes_have_their_own_maps(demo, monkeypatch, num_workers):
    """In several batches; the maps are those of the processor's pixel values, which other tests compare."""
    monkeypatch.setattr(encoder_methods, "PATCHES_PER_BATCH", 500)
    images = [noise(64, 96), noise(160, 64, 1), noise(64, 64, 2), noise(320, 320, 3), noise(96, 64, 4)]
    options = {"min_pixels": 64 * 64, "max_pixels": 512 * 512}
    found = demo.features(images, (2, -1, 0), num_workers=num_workers, **options)
    assert len(found) == len(images)
    for image, item in zip(images, found, strict=True):
        (alone,) = demo.features_of_pixels(*demo.image_processor(image, **options), (2, -1, 0))
        assert item.layers == (2, demo.config.depth, 0)
        assert item.grid == (1, image.shape[0] // 16, image.shape[1] // 16)
        assert not item.is_video
        for ours, expected in zip(item.maps, alone.maps, strict=True):
            assert ours.shape == (*item.grid[1:], demo.config.hidden_size)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_an_image_that_cannot_be_used_is_skipped_or_raises(demo):
    def source():
        yield noise(64, 64)
        yield b"broken"
        yield noise(64, 96)

    with pytest.warns(UserWarning, match=r"skipped images\[1\]"):
        found = demo.features(source(), on_error="skip")
    assert [item and item.grid[2] for item in found] == [found[0].grid[2], None, found[2].grid[2]]
    with pytest.warns(UserWarning, match="skipped"):
        assert demo.features([b"broken"], on_error="skip") == [None]
    came = []
    with pytest.raises(ValueError, match=r"images\[1\]"):
        came.extend(demo.iter_features(source()))
    assert [item.grid for item in came] == [found[0].grid]


def test_images_of_a_long_source_are_drawn_as_they_are_needed(demo, monkeypatch):
    monkeypatch.setattr(encoder_methods, "PATCHES_PER_BATCH", 1)
    drawn = []

    def source():
        for number in range(1000):
            drawn.append(number)
            yield noise(64, 64, number)

    features = demo.iter_features(source(), (1,), what="tokens", num_workers=1)
    assert drawn == []
    first = next(features)
    assert first.maps[0].shape == (*first.grid[1:], demo.config.hidden_size)
    features.close()
    assert len(drawn) < 200


@pytest.mark.parametrize("what", ["patches", "tokens"])
def test_a_video_has_maps_of_each_frame_group(demo, monkeypatch, what):
    """Also when it goes through the tower in several batches."""
    frames = np.stack([noise(64, 96, seed) for seed in range(7)])
    (expected,) = demo.features_of_pixels(*demo.video_processor(frames), (0, 2), what=what)
    for patches in (100_000, 1):
        monkeypatch.setattr(encoder_methods, "PATCHES_PER_BATCH", patches)
        found = demo.features_of_video(frames, (0, 2), what=what)
        assert found.is_video
        assert found.grid == expected.grid
        assert found.grid[0] == 4
        for ours, theirs in zip(found.maps, expected.maps, strict=True):
            assert ours.shape == (*found.grid, demo.config.hidden_size)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    one_group = demo.features_of_video(frames[:2], what=what)
    assert one_group.is_video
    assert one_group.maps[0].ndim == 4


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_transformers_hidden_states(family, checkpointing):
    config, grids = narrow(family, depth=3), [[1, 10, 8], [2, 4, 6]]
    hf = build_tower(config)
    tower = ours_from(hf, config)
    enc = Encoder(tower)
    tower.gradient_checkpointing = checkpointing
    pixels = random_pixels(128, config)
    ours, theirs = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    states = hidden_states(hf, config, theirs, grids)
    loss = sum((states[item][layer] ** 2).mean() * (item + layer + 1) for item in (0, 1) for layer in (0, 2))
    loss.backward()
    features = enc.features_of_pixels(ours, torch.tensor(grids), (2, 0))
    loss = sum(
        (one**2).mean() * (item + layer + 1)
        for item, found in enumerate(features)
        for layer, one in zip(found.layers, found.maps, strict=True)
    )
    loss.backward()
    assert ours.grad.any()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))


def test_the_fast_tower_refuses_gradients():
    config = narrow("qwen3_vl", depth=2)
    tower = FastTower(config, impl="reference")
    tower.load_state_dict(ReferenceTower(config).state_dict())
    with pytest.raises(ValueError, match="pixel_values, parameters: expected none that requires gradients"):
        Encoder(tower).features_of_pixels(random_pixels(4, config).requires_grad_(), torch.tensor([[1, 2, 2]]))


def test_layers_are_counted_as_transformers_counts_hidden_states():
    assert check_layers((0, 1, 12, -1, -2, -13), 12) == (0, 1, 12, 12, 11, 0)
    for layers in (range(3), np.arange(3), torch.arange(3), (np.int64(layer) for layer in range(3))):
        assert check_layers(layers, 2) == (0, 1, 2)
    for layers in ((), (13,), (0, -14)):
        with pytest.raises(ValueError, match=r"layers: expected at least one, from -13 to 12, got \["):
            check_layers(layers, 12)
    for layers in (3, "-1", None, (1.0,), (True,), ("1",), {1}):
        with pytest.raises(TypeError, match="layers: expected"):
            check_layers(layers, 12)


def test_wrong_arguments_are_refused_before_an_image_is_drawn(demo):
    def source():
        raise AssertionError("drawn")
        yield

    wrong = (
        ({"layers": (5,)}, "layers: expected at least one, from -5 to 4"),
        ({"what": "pixels"}, "what: expected 'patches' or 'tokens', got 'pixels'"),
        ({"on_error": "ignore"}, "on_error: expected"),
        ({"num_workers": -1}, "num_workers: expected"),
    )
    for arguments, message in wrong:
        for method in (demo.features, demo.iter_features):
            with pytest.raises(ValueError, match=message):
                method(source(), **arguments)
    with pytest.raises(TypeError, match="max_pixel"):
        demo.features(source(), max_pixel=5)
    with pytest.raises(ValueError, match="pixel_values: grid_thw"):
        demo.features_of_pixels(random_pixels(5, demo.config), torch.tensor([[1, 2, 2]]))


def test_features_in_float16_that_overflow_are_refused():
    """A norm would bring them back into range, and hide it: the layers are those before it."""
    config = narrow("qwen3_vl", depth=2)
    tower = ReferenceTower(config).half()
    with torch.no_grad():
        tower.blocks[0].mlp.fc2.bias.fill_(torch.inf)
    enc = Encoder(tower)
    assert enc.features(noise(64, 64), (0,))[0].maps[0].isfinite().all()
    with pytest.raises(OverflowError, match="exceed the range of float16"):
        enc.features(noise(64, 64), (1,))


def test_a_copy_on_the_cpu_keeps_nothing_of_the_batch(demo):
    found = demo.features([noise(64, 64), noise(64, 96)], (1, -1))
    copy = found[0].cpu()
    assert isinstance(copy, ItemFeatures)
    assert (copy.layers, copy.grid, copy.is_video) == (found[0].layers, found[0].grid, False)
    for ours, theirs in zip(copy.maps, found[0].maps, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.untyped_storage().nbytes() == ours.nbytes < theirs.untyped_storage().nbytes()
    assert repr(copy) == f"ItemFeatures(layers 1, 4; {list(copy.maps[0].shape)} torch.float32 each)"


def test_an_error_keeps_no_image(demo, monkeypatch):
    """No cycle of references may: a batch on a GPU would stay there until Python collects garbage."""
    references, compute = [], image_processor.compute_on_host

    def watched(frames, **options):
        prepared = compute(frames, **options)
        references.append(weakref.ref(prepared))
        return prepared

    monkeypatch.setattr(image_processor, "compute_on_host", watched)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match=r"images\[3\]"):
            demo.features([*(noise(64, 64, seed) for seed in range(3)), b"broken"], num_workers=0)
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
