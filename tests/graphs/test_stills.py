"""Still images in the fast tower: `encode` gives what the reference tower gives, and what a video of the image does."""

import numpy as np
import pytest
import torch

from qwenvit import Encoder
from qwenvit import encoder as encoder_module
from qwenvit.parity import close
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.towers import FULL, narrow

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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", FULL)
def test_images_get_the_reference_towers_embeddings(family, impl):
    fast, reference = encoders(family, impl)
    for images in (PICTURES, PICTURES[0]) * 2:
        assert_close(fast.encode(images, **BOUNDS), reference.encode(images, **BOUNDS))


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if GPU else [torch.float16])], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_encode_equals_the_tower_on_the_processors_pixel_values_bitwise(family, impl, dtype):
    """On a GPU, `encode` writes both frames there, in the tower's dtype."""
    fast, _ = encoders(family, impl, dtype)
    expected = fast(*fast.image_processor(PICTURES, **BOUNDS))
    for _ in range(2):
        out = fast.encode(PICTURES, **BOUNDS)
        assert torch.equal(out.packed, expected.pooler_output)
        for layer, features in zip(out.deepstack, expected.deepstack_features, strict=True):
            assert torch.equal(layer, features)


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
@pytest.mark.parametrize("columns", [587, 588, 1175, 1764])
def test_other_widths_are_refused(impl, columns):
    """Also one frame of a still image, 588 values."""
    fast, _ = encoders("qwen2_5_vl", impl)
    with pytest.raises(ValueError, match=rf"pixel_values: expected \[patches, 1176\].*got \[16, {columns}\]"):
        fast(torch.zeros(16, columns), torch.tensor([[1, 4, 4]]))


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
