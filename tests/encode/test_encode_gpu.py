"""Streams of images on a GPU: the caller's CUDA stream, reused buffers, broken images, leaving early, and nvJPEG."""

import gc
import io
import itertools
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit import encoder as encoder_module
from support.image_streams import WORKERS, broken_list, noise, refilled
from support.pictures import encoded
from support.prefetch_threads import assert_no_prefetch_threads
from support.towers import fast_encoder_on_gpu, narrow

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")


@pytest.fixture(scope="module")
def fast():
    """Return an encoder with the fast tower of two blocks, in bfloat16 on the GPU."""
    config = narrow("qwen2_5_vl", depth=2, out_hidden_size=64, intermediate_size=512)
    return fast_encoder_on_gpu(config)


def fast_expected(enc, images):
    """Return the tokens of each image, from pixel values of the CPU, all in one batch."""
    pixel_values, grid = enc.image_processor(images)
    return enc(pixel_values, grid).pooler_output.split((grid.prod(1) // 4).tolist())


def sizes_on_gpu(count=12):
    return [noise(100 + 31 * (index % 5), 120 + 45 * (index % 3), index) for index in range(count)]


@needs_gpu
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("patches", [1, 300, 32_768])
def test_gpu_results_are_the_same_whatever_batches_and_workers(fast, monkeypatch, num_workers, patches):
    images = sizes_on_gpu()
    expected = fast_expected(fast, images)
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", patches)
    for _ in range(3):  # without a graph, in the capture, in the replay
        assert torch.equal(fast.encode(images, num_workers=num_workers).packed, torch.cat(expected))
    items = list(fast.iter_encode(iter(images), num_workers=num_workers))
    assert all(torch.equal(item.tokens, tokens) for item, tokens in zip(items, expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("num_workers", WORKERS)
def test_results_may_be_used_at_once_on_the_callers_stream(fast, monkeypatch, num_workers):
    images = sizes_on_gpu(40)
    expected = fast_expected(fast, images)
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 500)
    torch.cuda.synchronize()
    stream, used = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        for item in fast.iter_encode(images, num_workers=num_workers):
            used.append(item.tokens.clone())
            item.tokens.fill_(torch.nan)  # writes to memory of this batch alone
            del item
            torch.full((2**20,), torch.nan, device="cuda")  # may be given memory that was freed
        used.append(fast.encode(images[:3], num_workers=num_workers).packed.clone())
    stream.synchronize()
    assert torch.equal(used.pop(), torch.cat(expected[:3]))
    assert all(map(torch.equal, used, expected))


@needs_gpu
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("channels", [3, 4])
def test_images_on_the_gpu_are_read_after_the_callers_stream_wrote_them(fast, num_workers, channels):
    """And before it writes to them again, once their embeddings are there. The fourth channel is alpha."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (150, 200, channels), dtype=np.uint8) for _ in range(8)]
    expected = fast_expected(fast, images)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for encode in (fast.encode, fast.iter_encode):
            on_gpu = [torch.zeros(150, 200, channels, dtype=torch.uint8, device="cuda") for _ in images]
            values = [torch.from_numpy(image).cuda() for image in images]
            stream.synchronize()
            torch.cuda._sleep(10**8)  # cycles: everything below is queued behind them
            for image, value in zip(on_gpu, values, strict=True):
                image.copy_(value)
            used = []
            for index, item in enumerate(encode(on_gpu, num_workers=num_workers)):
                on_gpu[index].zero_()
                used.append(item.tokens.clone())
            stream.synchronize()
            assert all(map(torch.equal, used, expected))


@needs_gpu
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("kind", ["array", "tensor", "CUDA tensor", "bytearray"])
def test_a_generator_may_refill_one_buffer_on_a_gpu(fast, kind, num_workers):
    arrays = [noise(100, 150, seed) for seed in range(30)]
    expected = fast_expected(fast, arrays)
    for encode in (fast.encode, fast.iter_encode):
        items = list(encode(refilled(kind, arrays), num_workers=num_workers))
        assert all(torch.equal(item.tokens, tokens) for item, tokens in zip(items, expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("num_workers", WORKERS)
def test_leaving_early_on_a_gpu(fast, monkeypatch, num_workers):
    """The next call gets right results, and no pinned memory stays in use."""
    images = sizes_on_gpu(30)
    expected = torch.cat(fast_expected(fast, images))
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 300)
    fast.encode(images)
    fast.encode(images)
    in_use = []
    for _ in range(4):  # the first rounds fill caches of tables
        for number, _ in enumerate(fast.iter_encode(itertools.cycle(images), num_workers=num_workers)):
            if number == 7:
                break
        assert_no_prefetch_threads()
        in_use.append(pinned_bytes_in_use())
    assert in_use[3] <= in_use[1]
    assert torch.equal(fast.encode(images, num_workers=num_workers).packed, expected)


def pinned_bytes_in_use():
    """Return the bytes of pinned blocks that tensors or copies use; 0 where torch does not say."""
    gc.collect()
    torch.cuda.synchronize()
    # What torch still holds after it gave back what it could: its count of bytes in use is wrong before 2.13.
    torch._C._host_emptyCache()
    stats = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
    return stats.get("allocated_bytes.current", 0)


@needs_gpu
def test_broken_images_on_a_gpu(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 1000)
    images, broken = broken_list(tmp_path)
    usable = [image for index, image in enumerate(images) if index not in broken]
    expected = fast_expected(fast, usable)
    with pytest.warns(UserWarning, match="^skipped ") as record:
        out = fast.encode(images, on_error="skip")
    assert len(record) == len(broken)
    assert [index for index, item in enumerate(out) if item is None] == list(broken)
    assert torch.equal(out.packed, torch.cat(expected))
    items = []
    with pytest.raises(ValueError, match=r"images\[46\]"):
        items.extend(fast.iter_encode(images[4:]))
    assert len(items) == 46
    with pytest.warns(UserWarning, match="skipped"):
        out = fast.encode([b"no image"] * 3, on_error="skip")
    assert list(out) == [None] * 3
    assert out.packed.is_cuda


@needs_gpu
@needs_torchvision
@pytest.mark.parametrize("num_workers", WORKERS)
def test_nvjpeg_decodes_jpeg_files_and_pillow_the_rest(fast, num_workers):
    smooth = Image.fromarray(noise(20, 30)).resize((300, 200), Image.Resampling.BICUBIC)
    jpeg, png = encoded(smooth, "JPEG"), encoded(smooth)
    prepare = fast.image_processor.preparer(fast.device, "nvjpeg")
    frames = prepare(0, jpeg).data
    assert frames.is_cuda
    truth = torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)))).permute(2, 0, 1)
    difference = (frames[0].cpu().int() - truth.int()).abs().float()
    assert difference.mean() <= 8  # of another picture, or of other channels, it is above 40
    with pytest.warns(UserWarning, match=r"images\[1\]: not a JPEG file that nvJPEG decodes; Pillow decodes it"):
        out = fast.encode([jpeg, png, jpeg], decode="nvjpeg", num_workers=num_workers)
    pillow = fast.encode([jpeg, png, jpeg])
    assert torch.equal(out[1].tokens, pillow[1].tokens)
    assert torch.equal(out[0].tokens, out[2].tokens)
    from_frames = fast_expected(fast, [frames[0].cpu()])[0]
    assert torch.equal(out[0].tokens, from_frames)
