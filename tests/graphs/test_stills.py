"""Still images in the fast tower: `encode` passes their single frame, and nothing else is taken for a still image."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qwenvit import Encoder
from qwenvit import encoder as encoder_module
from qwenvit.parity import close
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.towers import FULL, narrow, random_pixels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
IMPLS = ["reference", pytest.param("triton", marks=NEEDS_GPU)]  # "triton" runs in CUDA graphs
BOUNDS = {"min_pixels": 4096, "max_pixels": 40_000}


@pytest.fixture(autouse=True)
def _ieee_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def encoders(family, impl, dtype=torch.float32):
    """Return encoders with the fast tower and with the reference tower, of the same weights and two blocks."""
    config = narrow(family, depth=2, out_hidden_size=24)
    torch.manual_seed(0)
    reference = ReferenceTower(config).requires_grad_(False)
    for parameter in reference.parameters():
        parameter += 0.02 * torch.randn(parameter.shape)
    fast = FastTower(config, impl)
    fast.load_state_dict(reference.state_dict())
    return tuple(Encoder(tower.to(DEVICE, dtype)) for tower in (fast, reference))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = [picture(130, 200), picture(64, 64, 1), picture(90, 150, 2)]


def assert_close(ours, theirs):
    outputs = [("tokens", ours.packed, theirs.packed)]
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        layers = zip(our.deepstack, their.deepstack, strict=True)
        outputs += [(f"DeepStack {layer} of {i}", *pair) for layer, pair in enumerate(layers)]
    for name, *pair in outputs:
        check = close(name, *pair)
        assert check.passed, check


def watch_widths(monkeypatch):
    """Return a list to which every run of an encoder appends the columns of its pixel values."""
    widths, run = [], Encoder._run

    def watched(self, pixel_values, grid):
        widths.append(pixel_values.shape[1])
        return run(self, pixel_values, grid)

    monkeypatch.setattr(Encoder, "_run", watched)
    return widths


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", FULL)
def test_images_get_the_reference_towers_embeddings(family, impl):
    fast, reference = encoders(family, impl)
    for images in (PICTURES, PICTURES[0]):
        assert_close(fast.encode(images, **BOUNDS), reference.encode(images, **BOUNDS))


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if GPU else [torch.float16])], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_single_frame_equals_two_equal_frames_bitwise(family, impl, dtype):
    """The GPU repeats the frame, so rounding is the same."""
    fast, _ = encoders(family, impl, dtype)
    single = fast.encode(PICTURES, **BOUNDS)
    double = fast(*fast.image_processor(PICTURES, **BOUNDS))
    assert torch.equal(single.packed, double.pooler_output)
    for layer, expected in enumerate(double.deepstack_features):
        assert torch.equal(torch.cat([item.deepstack[layer] for item in single]), expected)


def test_only_encode_passes_a_single_frame_and_only_to_the_fast_tower(monkeypatch):
    widths = watch_widths(monkeypatch)
    fast, reference = encoders("qwen2_5_vl", "reference")
    two_frames, frames = fast.config.patch_dim, [PICTURES[0]] * 2
    for enc, expected in ((fast, [two_frames // 2, two_frames, two_frames]), (reference, [two_frames] * 3)):
        widths.clear()
        enc.encode(PICTURES[0], **BOUNDS)
        enc.encode_video(frames, **BOUNDS)
        pixel_values, grid = enc.image_processor(PICTURES, **BOUNDS)
        assert pixel_values.shape[1] == two_frames
        enc(pixel_values, grid)
        assert widths == expected
        with pytest.raises(ValueError, match=rf"pixel_values: expected \[patches, {two_frames}\]"):
            enc(pixel_values[:, : two_frames // 2], grid)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_video_of_two_frames_is_not_a_still_image(family, impl):
    """Its grid is that of an image, t = 1. Images and videos alternate, so that they share graphs."""
    fast, reference = encoders(family, impl)
    first, second = picture(128, 96, 3), picture(128, 96, 4)
    still = fast.encode(first, resize="torch", **BOUNDS)
    for frames in ([first, second], [second, first]):
        video, expected = (enc.encode_video(frames, **BOUNDS) for enc in (fast, reference))
        assert video.grid_thw.tolist() == still.grid_thw.tolist()
        assert_close(video, expected)
        assert not close("a frame alone", video.packed, still.packed).passed
        inputs = fast.video_processor(frames, **BOUNDS)
        assert torch.equal(fast(*inputs).pooler_output, video.packed)
        assert torch.equal(fast.encode(first, resize="torch", **BOUNDS).packed, still.packed)
    assert torch.equal(fast.encode_video([first, first], **BOUNDS).packed, still.packed)


@pytest.mark.parametrize("impl", IMPLS)
def test_images_in_several_batches(monkeypatch, impl):
    fast, reference = encoders("qwen2_5_vl", impl)
    expected = reference.encode(PICTURES, **BOUNDS)
    for patches in (1, 200):
        monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", patches)
        assert_close(fast.encode(iter(PICTURES), **BOUNDS), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_that_change_later(impl):
    fast, reference = encoders("qwen2_5_vl", impl)
    before = fast.encode(PICTURES, **BOUNDS)
    with torch.no_grad():
        reference.tower.patch_embed.proj.weight.mul_(1.5)
    fast.tower.load_state_dict(reference.tower.state_dict())
    after = fast.encode(PICTURES, **BOUNDS)
    assert_close(after, reference.encode(PICTURES, **BOUNDS))
    assert not close("the old weights", after.packed, before.packed).passed
    for enc in (fast, reference):
        enc.tower.half().float()
    assert_close(fast.encode(PICTURES, **BOUNDS), reference.encode(PICTURES, **BOUNDS))
    assert set(fast.tower.state_dict()) == set(reference.tower.state_dict())


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_every_channel_repeats_its_frame(frames):
    """The values of a patch are ordered by channel, then by frame."""
    fast, _ = encoders("qwen2_vl", "reference")
    tower = FastTower(replace(fast.config, temporal_patch_size=frames), "reference")
    still = torch.arange(2 * 588.0).view(2, 3, 196)
    expected = torch.stack([still] * frames, dim=2)
    assert torch.equal(tower.patch_embed.expand_frames(still.flatten(1)), expected)
    assert torch.equal(tower.patch_embed.expand_frames(expected.flatten(1)), expected)


@pytest.mark.parametrize("shape", [(16, 587), (16, 392), (16, 1175), (16, 1764), (16, 3, 196), (588,)])
def test_other_widths_are_refused(shape):
    fast, _ = encoders("qwen2_5_vl", "reference")
    plan = GridPlan.build([[1, 4, 4]], fast.config, DEVICE)
    expected = r"pixel_values: expected \[patches, 1176\], or \[patches, 588\] of still images, got \["
    with pytest.raises(ValueError, match=expected):
        fast.tower(torch.zeros(shape, device=DEVICE), plan)


def test_the_tower_itself_takes_one_or_two_frames():
    fast, _ = encoders("qwen3_vl", "reference")
    plan = GridPlan.build([[1, 4, 6]], fast.config, DEVICE)
    still = random_pixels(24, fast.config).to(DEVICE)[:, :768].double()
    repeated = torch.cat([still.view(24, 3, 1, 256)] * 2, dim=2).flatten(1)
    assert torch.equal(fast.tower(still, plan).pooler_output, fast.tower(repeated, plan).pooler_output)
