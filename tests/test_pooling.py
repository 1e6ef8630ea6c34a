"""`Embeddings.pooled`: means against fp64, and every bit of a vector from its own item alone."""

import numpy as np
import pytest
import torch

import qwenvit
from qwenvit.encoder import Encoder
from qwenvit.outputs import Embeddings
from qwenvit.pooling import CHUNK_ROWS, mean_of_items, normalized
from qwenvit.towers.reference import ReferenceTower
from support.demo import demo_encoder
from support.towers import SMALL, narrow

SIZES = [1, 2, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 300, 1, 2 * CHUNK_ROWS]


@pytest.fixture(scope="module")
def demo():
    return demo_encoder()


def rows_of(sizes, width=24, dtype=torch.float32, seed=0):
    """Return rows with a channel 100 times larger than the rest, as towers have."""
    rows = torch.randn(sum(sizes), width, generator=torch.Generator().manual_seed(seed)) + 0.5
    rows[:, 3] *= 100
    return rows.to(dtype)


def noise(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_are_those_of_fp64(dtype):
    rows = rows_of(SIZES, dtype=dtype)
    means = mean_of_items(rows, SIZES)
    truth = torch.stack([part.double().mean(0) for part in rows.split(SIZES)])
    assert means.dtype == torch.float32
    torch.testing.assert_close(means.double(), truth, rtol=1e-6, atol=1e-6)


def test_a_vector_has_the_same_bits_alone_and_in_every_batch():
    rows = rows_of(SIZES, dtype=torch.bfloat16)
    parts = rows.split(SIZES)
    together, unit = mean_of_items(rows, SIZES), normalized(mean_of_items(rows, SIZES))
    for index, part in enumerate(parts):
        alone = mean_of_items(part, [len(part)])
        assert torch.equal(alone[0], together[index])
        assert torch.equal(normalized(alone)[0], unit[index])
    backwards = mean_of_items(torch.cat(parts[::-1]), SIZES[::-1])
    assert torch.equal(backwards.flip(0), together)


def test_normalized_vectors_have_length_one_and_their_direction():
    vectors = rows_of([5], width=257)
    unit = normalized(vectors)
    truth = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit.double(), truth, rtol=1e-6, atol=1e-7)
    zeros = torch.zeros(2, 5)
    assert torch.equal(normalized(zeros), zeros)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])  # with windows, and with DeepStack
@pytest.mark.parametrize("batched", [True, False])
def test_vectors_of_images_are_means_of_the_towers_output(family, batched):
    torch.manual_seed(0)
    enc = Encoder(ReferenceTower(narrow(family, depth=2, out_hidden_size=24)))
    images = [noise(40 + 30 * index, 90 - 11 * index, index) for index in range(5)]
    options = {"min_pixels": 4096, "keep_patches": True}
    out = (
        enc.encode(images, **options) if batched else Embeddings.concatenate([enc.encode(i, **options) for i in images])
    )
    for index, image in enumerate(images):
        truth = enc(*enc.image_processor(image, min_pixels=4096))
        pairs = (("mean", truth.pooler_output), ("patches", truth.last_hidden_state))
        for mode, rows in pairs:
            vector = out.pooled(mode)[index].double()
            torch.testing.assert_close(vector, rows.double().mean(0), rtol=1e-5, atol=1e-6)
            length = float(out.pooled(mode, normalize=True)[index].double().norm())
            assert abs(length - 1) < 1e-6


def test_a_video_has_one_vector_of_all_its_frames(demo):
    frames = [noise(64, 96, index) for index in range(5)]
    out = demo.encode_video(frames, keep_patches=True, min_pixels=1024)
    expected = out.packed.double().mean(0, keepdim=True)
    torch.testing.assert_close(out.pooled().double(), expected, rtol=1e-5, atol=1e-6)
    assert len(out.last_hidden_state) == int(out.grid_thw.prod())
    expected = out.last_hidden_state.double().mean(0, keepdim=True)
    torch.testing.assert_close(out.pooled("patches").double(), expected, rtol=1e-5, atol=1e-6)


def test_skipped_images_have_an_error_and_no_vector(demo):
    images = [b"broken", noise(64, 64, 0), b"", noise(32, 96, 1)]
    with pytest.warns(UserWarning, match="skipped"):
        out = demo.encode(images, on_error="skip", keep_patches=True, min_pixels=1024)
    assert out.pooled().shape == (2, demo.config.out_hidden_size)
    assert out.pooled("patches").shape == (2, demo.config.hidden_size)
    assert out.errors.keys() == {0, 2}
    assert "images[2]" in str(out.errors[2])
    twice = Embeddings.concatenate([out, out])
    assert [twice.errors.get(position) for position in range(8)] == [out.errors.get(p) for p in (0, 1, 2, 3)] * 2
    assert torch.equal(twice.pooled("patches"), out.pooled("patches").repeat(2, 1))


def test_a_batch_of_broken_images_has_no_vectors(demo):
    with pytest.warns(UserWarning, match="skipped"):
        out = demo.encode([b"broken"], on_error="skip", keep_patches=True)
    assert out.pooled().shape == (0, demo.config.out_hidden_size)
    assert out.pooled("patches", normalize=True).shape == (0, demo.config.hidden_size)


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_the_default_encoder_keeps_patches_on_request(demo):
    image = noise(64, 64, 0)
    found = qwenvit.encode(image, model="demo", device="cpu", keep_patches=True, min_pixels=1024)
    expected = demo.encode(image, keep_patches=True, min_pixels=1024)
    assert torch.equal(found.pooled("patches"), expected.pooled("patches"))
    assert qwenvit.encode(image, model="demo", device="cpu", min_pixels=1024).last_hidden_state is None


def test_modes_that_cannot_be():
    one_image = (torch.ones(4, 4), torch.tensor([[1, 4, 4]]), [], SMALL["qwen2_vl"])
    out = Embeddings(*one_image)
    with pytest.raises(ValueError, match=r"mode: 'patches' needs .* pass keep_patches=True"):
        out.pooled("patches")
    with pytest.raises(ValueError, match="mode: expected 'mean' or 'patches', got 'max'"):
        out.pooled("max")
    kept = Embeddings(
        *(torch.ones(4, 4), torch.tensor([[1, 4, 4]]), [], SMALL["qwen2_vl"]), last_hidden_state=torch.ones(16, 8)
    )
    with pytest.raises(ValueError, match="keep_patches"):
        Embeddings.concatenate([kept, out]).pooled("patches")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_vectors_on_a_gpu_have_the_same_bits_in_every_batch():
    sizes = [1, 63, 64, 65, 400, 15301, 1]
    rows = rows_of(sizes, width=3584, dtype=torch.bfloat16).cuda()
    together = normalized(mean_of_items(rows, sizes))
    for index, part in enumerate(rows.split(sizes)):
        assert torch.equal(normalized(mean_of_items(part, [len(part)]))[0], together[index])
        truth = part.double().mean(0)
        torch.testing.assert_close(mean_of_items(part, [len(part)])[0].double(), truth, rtol=1e-5, atol=1e-5)
