"""Images for streams: of noise, broken, in buffers that are refilled; and whether embeddings are as expected."""

import io
import re

import numpy as np
import torch
from PIL import Image

from support.pictures import encoded

SMALL_IMAGES = {"min_pixels": 1024}
"""Smaller images than the demo's own bounds allow: tests are faster."""
WORKERS = [0, 1, 4]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def one_at_a_time(enc, images, **options):
    """Return the embeddings of each image from the tower itself, in a batch of its own."""
    alone = []
    for image in images:
        output = enc(*enc.image_processor(image, **options))
        alone.append((output.pooler_output, output.deepstack_features))
    return alone


def assert_same(items, expected):
    items = list(items)
    assert len(items) == len(expected)
    for index, (item, (tokens, deepstack)) in enumerate(zip(items, expected, strict=True)):
        assert torch.equal(item.tokens, tokens), index
        assert len(item.deepstack) == len(deepstack)
        assert all(map(torch.equal, item.deepstack, deepstack)), index


def broken_list(folder):
    """Return 200 images, some of which cannot be used, and of each of these a part of its message."""
    path = re.escape(str(folder))
    good = [noise(40 + index, 50, index) for index in range(4)]
    images = [good[index % 4] for index in range(200)]
    (folder / "truncated.jpg").write_bytes(encoded(Image.fromarray(noise(200, 200)), "JPEG")[:-3000])
    (folder / "text.png").write_text("no image")
    broken = {
        3: (folder / "truncated.jpg", rf"images\[3\] \({path}/truncated.jpg\): broken image file"),
        50: (folder / "text.png", rf"images\[50\] \({path}/text.png\): expected an image file"),
        51: (folder / "missing.png", rf"images\[51\]: No such file or directory: '{path}/missing.png'"),
        120: (good[0].astype(np.float64), r"images\[120\]: expected uint8, got float64"),
        199: (noise(5, 1015), r"images\[199\]: .*200"),
    }
    for index, (image, _) in broken.items():
        images[index] = image
    return images, {index: message for index, (_, message) in broken.items()}


def refilled(kind, arrays):
    """Yield one buffer of a kind over and over, filled with one image after another."""
    if kind == "bytearray":
        buffer = bytearray()
        for array in arrays:
            buffer[:] = encoded(Image.fromarray(array))
            yield buffer
        buffer[:] = b"the end"
        return
    if kind == "BytesIO":
        stream = io.BytesIO()
        for array in arrays:
            stream.seek(0)
            stream.truncate()
            stream.write(encoded(Image.fromarray(array)))
            yield stream
        return
    array = np.empty_like(arrays[0])
    shared = torch.from_numpy(array).to("cuda") if kind == "CUDA tensor" else torch.from_numpy(array)
    for values in arrays:
        shared.copy_(torch.from_numpy(values))
        yield array if kind == "array" else shared
    shared.zero_()
