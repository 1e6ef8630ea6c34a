"""Images that the caller refills, gives again, moves to another frame or closes once they were given."""

import io

import pytest
import torch
from PIL import Image, ImageSequence

from qwenvit import encoder as encoder_module
from support.image_streams import SMALL_IMAGES, WORKERS, assert_same, noise, one_at_a_time, refilled
from support.pictures import encoded


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("kind", ["array", "tensor", "bytearray", "BytesIO"])
def test_a_generator_may_refill_one_buffer(demo, monkeypatch, kind, num_workers):
    arrays = [noise(48, 80, seed) for seed in range(30)]
    expected = one_at_a_time(demo, arrays, **SMALL_IMAGES)
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 1)
    for encode in (demo.encode, demo.iter_encode):
        assert_same(encode(refilled(kind, arrays), num_workers=num_workers, **SMALL_IMAGES), expected)


def test_one_pil_image_many_times(demo, monkeypatch):
    """Pillow reads a file at the first use of the image, here by all threads at once."""
    expected = one_at_a_time(demo, [noise(200, 300)], **SMALL_IMAGES)
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 1)
    for _ in range(5):
        image = Image.open(io.BytesIO(encoded(Image.fromarray(noise(200, 300)))))
        assert_same(demo.encode([image] * 20, num_workers=4, **SMALL_IMAGES), expected * 20)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("num_workers", WORKERS)
def test_the_frames_of_an_animation_may_be_streamed(demo, kind, num_workers):
    """Pillow's iterator yields one object again and again, at other frames."""
    frames = [Image.fromarray(noise(40, 64, index)).convert("P" if kind == "GIF" else "RGB") for index in range(8)]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    animation = Image.open(file)
    expected = []
    for index in range(animation.n_frames):
        animation.seek(index)
        expected.append(demo.encode(animation.convert("RGB"), **SMALL_IMAGES)[0].tokens)
    streamed = demo.iter_encode(ImageSequence.Iterator(Image.open(file)), num_workers=num_workers, **SMALL_IMAGES)
    for item, tokens in zip(streamed, expected, strict=True):
        torch.testing.assert_close(item.tokens, tokens)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_files_may_be_closed_after_they_are_yielded(demo, tmp_path, num_workers):
    for index in range(8):
        Image.fromarray(noise(32, 64, index)).save(tmp_path / f"{index}.png")

    def opened():
        for index in range(8):
            with Image.open(tmp_path / f"{index}.png") as image:
                yield image

    expected = demo.encode([tmp_path / f"{index}.png" for index in range(8)], **SMALL_IMAGES)
    streamed = list(demo.iter_encode(opened(), num_workers=num_workers, **SMALL_IMAGES))
    assert torch.equal(torch.cat([item.tokens for item in streamed]), expected.packed)
