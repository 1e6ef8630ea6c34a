"""Streams of images through the encoder: order, broken images, reused buffers, memory, threads, and leaving early."""

import gc
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import qwenvit
from qwenvit import encoder as encoder_module
from qwenvit import input_stream
from qwenvit.encoder import Encoder
from qwenvit.outputs import Embeddings
from qwenvit.preprocess import image_processor
from qwenvit.preprocess import prefetch as prefetch_module
from qwenvit.preprocess.decode import snapshot
from qwenvit.towers.reference import ReferenceTower
from support.prefetch_threads import assert_no_prefetch_threads, prefetch_threads
from support.towers import SMALL, fast_encoder_on_gpu, narrow

ROOT = Path(__file__).parents[1]
SMALL_IMAGES = {"min_pixels": 1024}
"""Smaller images than the demo's own bounds allow: tests are faster."""
WORKERS = [0, 1, 4]


@pytest.fixture(scope="module")
def demo():
    with warnings.catch_warnings(action="ignore"):
        return Encoder.from_pretrained("demo", device="cpu")


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert_no_prefetch_threads()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, file_format="PNG"):
    stream = io.BytesIO()
    image.save(stream, file_format)
    return stream.getvalue()


def images_of_every_kind(folder, count=16):
    """Return images of several sizes: arrays, tensors, PIL images, paths and bytes in turn."""
    images = []
    for index in range(count):
        array = noise(33 + 17 * (index % 5), 40 + 23 * (index % 3), index)
        path = folder / f"{index}.png"
        Image.fromarray(array).save(path)
        kinds = (array, torch.from_numpy(array), Image.fromarray(array), path, path.read_bytes(), Image.open(path))
        images.append(kinds[index % len(kinds)])
    return images


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


@pytest.mark.parametrize("num_workers", WORKERS)
def test_results_are_those_of_one_image_at_a_time(demo, tmp_path, monkeypatch, num_workers):
    """In batches of one: on a CPU, products of other heights may be added in another order."""
    images = images_of_every_kind(tmp_path)
    expected = one_at_a_time(demo, images, **SMALL_IMAGES)
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 1)
    options = {"num_workers": num_workers, **SMALL_IMAGES}
    out = demo.encode(images, **options)
    assert_same(out, expected)
    assert torch.equal(out.packed, torch.cat([tokens for tokens, _ in expected]))
    assert torch.equal(out.grid_thw, demo.image_processor(images, **SMALL_IMAGES)[1])
    assert_same(demo.iter_encode(images, **options), expected)
    assert_same(demo.iter_encode(iter(images), **options), expected)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_results_are_those_of_the_same_batches_whatever_the_workers(family, tmp_path, monkeypatch):
    config = narrow(family, depth=2, out_hidden_size=24)
    torch.manual_seed(0)
    enc, images = Encoder(ReferenceTower(config)), images_of_every_kind(tmp_path)
    options = {"min_pixels": 4096}
    whole = enc(*enc.image_processor(images, **options))
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 100)
    batches = [[0]]
    sizes = enc.image_processor(images, **options)[1].prod(1).tolist()
    for index in range(1, len(images)):
        if sum(sizes[i] for i in batches[-1]) + sizes[index] > 100:
            batches.append([])
        batches[-1].append(index)
    assert 3 <= len(batches) < len(images)
    expected = [enc(*enc.image_processor([images[i] for i in batch], **options)) for batch in batches]
    for num_workers in WORKERS:
        out = enc.encode(images, num_workers=num_workers, **options)
        assert torch.equal(out.packed, torch.cat([output.pooler_output for output in expected]))
        torch.testing.assert_close(out.packed, whole.pooler_output)
        for layer in range(len(whole.deepstack_features)):
            assert torch.equal(
                out.deepstack[layer], torch.cat([output.deepstack_features[layer] for output in expected])
            )


def broken_list(folder):
    """Return 200 images, some of which cannot be used, and of each of these a part of its message."""
    good = [noise(40 + index, 50, index) for index in range(4)]
    images = [good[index % 4] for index in range(200)]
    (folder / "truncated.jpg").write_bytes(encoded(Image.fromarray(noise(200, 200)), "JPEG")[:-3000])
    (folder / "text.png").write_text("no image")
    broken = {
        3: (folder / "truncated.jpg", rf"images\[3\] \({folder}/truncated.jpg\): broken image file"),
        50: (folder / "text.png", rf"images\[50\] \({folder}/text.png\): expected an image file"),
        51: (folder / "missing.png", rf"images\[51\]: No such file or directory: '{folder}/missing.png'"),
        120: (good[0].astype(np.float64), r"images\[120\]: expected uint8, got float64"),
        199: (noise(5, 1015), r"images\[199\]: .*200"),
    }
    for index, (image, _) in broken.items():
        images[index] = image
    return images, {index: message for index, (_, message) in broken.items()}


@pytest.mark.parametrize("num_workers", WORKERS)
def test_broken_images_are_skipped_with_a_warning_of_each(demo, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 64)
    images, broken = broken_list(tmp_path)
    usable = [image for index, image in enumerate(images) if index not in broken]
    expected = demo.encode(usable, num_workers=0, **SMALL_IMAGES)
    options = {"num_workers": num_workers, "on_error": "skip", **SMALL_IMAGES}
    with pytest.warns(UserWarning, match="^skipped ") as record:
        out = demo.encode(images, **options)
    assert len(record) == len(broken)
    for warning, message in zip(record, broken.values(), strict=True):
        assert re.search(message, str(warning.message))
    assert [index for index, item in enumerate(out) if item is None] == list(broken)
    assert torch.equal(out.grid_thw, expected.grid_thw)
    assert_same([item for item in out if item], [(item.tokens, item.deepstack) for item in expected])
    with pytest.warns(UserWarning, match="^skipped "):
        items = list(demo.iter_encode(iter(images), **options))
    assert [item is None for item in items] == [index in broken for index in range(200)]
    assert_same([item for item in items if item], [(item.tokens, item.deepstack) for item in expected])


@pytest.mark.parametrize("num_workers", WORKERS)
def test_the_first_broken_image_is_raised_in_its_turn(demo, tmp_path, monkeypatch, num_workers):
    images, broken = broken_list(tmp_path)
    options = {"num_workers": num_workers, **SMALL_IMAGES}
    with pytest.raises(ValueError, match=broken[3]):
        demo.encode(images, **options)
    for patches in (1, 64, 10**6):
        monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", patches)
        items, stream = [], demo.iter_encode(images[4:], **options)
        with pytest.raises(ValueError, match=broken[50].replace("50", "46")):
            items.extend(stream)
        assert len(items) == 46
        with pytest.raises(StopIteration):
            next(stream)
    for index, error in ((51, FileNotFoundError), (120, TypeError), (199, ValueError)):
        with pytest.raises(error, match=broken[index].replace(str(index), "1")):
            demo.encode([images[0], images[index], images[50]], **options)


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_generators_own_exception_is_raised_after_all_images_before(demo, monkeypatch, num_workers, error):
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 20)

    def source():
        for index in range(7):
            yield noise(32, 64, index)
        raise error("the disk is gone")

    items = []
    with pytest.raises(error, match="the disk is gone"):
        items.extend(demo.iter_encode(source(), num_workers=num_workers, on_error="skip", **SMALL_IMAGES))
    if error is OSError:  # an interrupt ends at once
        assert len(items) == 7
    assert_no_prefetch_threads()


@pytest.mark.parametrize("num_workers", WORKERS)
def test_leaving_early_leaves_no_thread(demo, monkeypatch, num_workers):
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 20)
    endless = (noise(32, 64, index) for index in itertools.count())
    for item in demo.iter_encode(endless, num_workers=num_workers, **SMALL_IMAGES):
        assert item.grid == (1, 1, 2)
        break
    del item
    assert_no_prefetch_threads()
    streams = [demo.iter_encode(itertools.repeat(noise(32, 64)), num_workers=num_workers, **SMALL_IMAGES)]
    next(streams[0])
    assert bool(prefetch_threads()) == (num_workers > 0)
    streams.clear()
    assert_no_prefetch_threads()
    again = demo.encode(noise(32, 64, 5), **SMALL_IMAGES)
    assert_same(again, one_at_a_time(demo, [noise(32, 64, 5)], **SMALL_IMAGES))


def test_an_iterator_that_is_never_started_starts_no_thread(demo):
    demo.iter_encode(itertools.repeat(noise(32, 64)), num_workers=4)
    assert not prefetch_threads()


def test_an_interrupt_in_the_middle_of_a_stream_ends_the_interpreter():
    code = """if True:
        import itertools, os, signal, threading
        import numpy as np
        from qwenvit import Encoder
        encoder = Encoder.from_pretrained("demo", device="cpu")
        stream = encoder.iter_encode(itertools.repeat(np.zeros((32, 64, 3), np.uint8)), num_workers=3, min_pixels=1024)
        next(stream)
        print("started", flush=True)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        list(stream)
    """
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "started\n"
        stderr = process.communicate(timeout=20)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (1, -signal.SIGINT), stderr  # by version of Python
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert stderr.endswith("KeyboardInterrupt\n")


def test_ten_threads_share_an_encoder(demo, monkeypatch):
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 1)
    lists = [[noise(33 + 7 * (index % 4), 64, 10 * number + index) for index in range(8)] for number in range(10)]
    expected = [one_at_a_time(demo, images, **SMALL_IMAGES) for images in lists]
    results, errors, start = {}, [], threading.Barrier(10)

    def work(number):
        try:
            torch.set_num_threads(2)
            start.wait(30)
            encode = demo.encode if number % 2 else demo.iter_encode
            results[number] = list(encode(lists[number], num_workers=number % 3, **SMALL_IMAGES))
        except Exception as error:  # noqa: BLE001  (nobody would see a thread's exception)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for number in range(10):
        assert_same(results[number], expected[number])


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


def test_a_progress_bar_on_request(demo, capsys):
    images = [noise(32, 64, seed) for seed in range(7)]
    demo.encode(images, **SMALL_IMAGES)
    list(demo.iter_encode(iter(images), **SMALL_IMAGES))
    silent = capsys.readouterr()
    assert (silent.out, silent.err) == ("", "")
    demo.encode(images, progress=True, **SMALL_IMAGES)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "7/7" in shown.err
    assert "image/s" in shown.err
    list(demo.iter_encode(iter(images), progress=True, **SMALL_IMAGES))
    shown = capsys.readouterr().err
    assert "7image" in shown.replace(" ", "")
    assert "/7" not in shown  # nobody knows how many a generator has


@pytest.mark.parametrize("nothing", [[], (), iter([]), (image for image in ())])
def test_no_image_at_all(demo, nothing):
    with pytest.raises(ValueError, match=r"^images: expected at least one image, got none$"):
        demo.encode(nothing)
    with pytest.raises(ValueError, match=r"^images: expected at least one image, got none$"):
        list(demo.iter_encode(iter(())))


BAD_ARGUMENTS = [
    ({"num_workers": -1}, ValueError, "num_workers: expected None or an integer of at least 0, got -1"),
    ({"num_workers": True}, ValueError, "num_workers: expected None or an integer of at least 0, got True"),
    ({"on_error": "ignore"}, ValueError, "on_error: expected 'raise' or 'skip', got 'ignore'"),
    ({"decode": "x"}, ValueError, "decode: expected 'pillow' or 'nvjpeg', got 'x'"),
    ({"decode": "nvjpeg"}, ValueError, "decode: 'nvjpeg' needs a tower on a GPU, got one on cpu"),
    ({"max_token": 3}, TypeError, "options: expected only .*, got max_token"),
    ({"min_pixels": 10**6, "max_pixels": 10**5}, ValueError, "min_pixels=1000000 is above max_pixels=100000"),
    ({"resize": "nearest"}, ValueError, "resize: expected 'pillow' or 'torch', got 'nearest'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_the_call(demo, arguments, error, message):
    images = iter([noise(32, 64)])
    for encode in (demo.encode, demo.iter_encode):
        with pytest.raises(error, match=f"^{message}"):
            encode(images, **arguments)
    assert len(list(images)) == 1  # none was drawn


def test_all_images_skipped(demo):
    for images in ([b"no image"], [b"no image"] * 5):
        with pytest.warns(UserWarning, match="skipped"):
            out = demo.encode(images, on_error="skip")
        assert list(out) == [None] * len(images)
        assert out.packed.shape == (0, demo.config.out_hidden_size)
        assert out.packed.dtype == demo.dtype
        assert out.grid_thw.shape == (0, 3)
        assert out.grid_thw.dtype == torch.int64
        assert "skipped" in repr(out)


def part(sizes, skipped=(), width=4, seed=0):
    """Return embeddings of images of `sizes` tokens a side, some skipped, with a DeepStack layer where any is left."""
    tokens = sum(size * size for size in sizes)
    packed, layer = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(seed))
    grid = torch.tensor([[1, 2 * size, 2 * size] for size in sizes], dtype=torch.int64).view(-1, 3)
    return Embeddings(packed, grid, [layer] if sizes else [], SMALL["qwen2_vl"], skipped=skipped)


@pytest.mark.parametrize(
    "parts",
    [
        [([1, 2, 3], [0, 2, 5])],
        [([1, 2], []), ([3], [0, 2]), ([], [0, 1]), ([2], [])],
        [([], [0]), ([2, 1], [1])],
        [([2, 1], [2]), ([], [0])],
        [([], [0]), ([], [0, 1])],
    ],
)
def test_concatenation_keeps_the_places_of_skipped_images(parts):
    embeddings = [part(*arguments, seed=seed) for seed, arguments in enumerate(parts)]
    for (sizes, skipped), one in zip(parts, embeddings, strict=True):
        assert len(one) == len(sizes) + len(skipped)
        assert [index for index, item in enumerate(one) if item is None] == list(skipped)
    whole = Embeddings.concatenate(embeddings)
    items = [item for one in embeddings for item in one]
    assert len(whole) == len(items)
    for item, expected in zip(whole, items, strict=True):
        assert (item is None) == (expected is None)
        if item is not None:
            assert item.grid == expected.grid
            assert torch.equal(item.tokens, expected.tokens)
            assert all(map(torch.equal, item.deepstack, expected.deepstack))
    assert torch.equal(whole.packed, torch.cat([one.packed for one in embeddings]))
    assert torch.equal(whole.grid_thw, torch.cat([one.grid_thw for one in embeddings]))


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_stays_flat_over_many_images(demo, monkeypatch):
    """Kept pixel values would take 295 MB."""
    monkeypatch.setattr(encoder_module, "PATCHES_PER_BATCH", 160)
    monkeypatch.setattr(prefetch_module, "MAX_READY_BYTES", 2**22)
    drawn, resident, alive, ahead = itertools.count(), [], [], []
    count = 0

    def source():
        nonlocal count
        for count in range(1, 3001):  # noqa: B007  (read below)
            yield np.full((64, 64, 3), next(drawn) % 256, np.uint8)

    for index, item in enumerate(demo.iter_encode(source(), num_workers=3, min_pixels=4096)):
        ahead.append(count - index)
        alive.append(weakref.ref(item))
        if index % 500 == 499:
            resident.append(resident_megabytes())
    assert len(ahead) == 3000
    assert max(ahead) < 200
    assert sum(ref() is not None for ref in alive) <= 20
    assert max(resident[1:]) - resident[0] < 100, resident


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("broken", ["some", "all"])
def test_images_that_were_skipped_are_not_kept(demo, broken):
    """The traceback of an error refers to the image, or to the bytes of its file."""
    alive, most = [], 0

    def source():
        nonlocal most
        for index in range(500):
            image = noise(32, 64).astype(np.uint8 if broken == "some" and index % 2 else np.float64)
            if image.dtype == np.float64:
                alive.append(weakref.ref(image))
            yield image
            del image
            most = max(most, sum(ref() is not None for ref in alive))

    items = list(demo.iter_encode(source(), num_workers=0, on_error="skip", **SMALL_IMAGES))
    assert len(items) == 500
    assert most <= 10


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_the_default_encoder_passes_everything_on(capsys):
    images = [noise(32, 64), b"no image", noise(64, 32)]
    options = {"model": "demo", "device": "cpu", "on_error": "skip", "num_workers": 2, "max_tokens": 4}
    with pytest.warns(UserWarning, match=r"skipped images\[1\]"):
        out = qwenvit.encode(images, **options, progress=True)
    assert [item and len(item.tokens) for item in out] == [2, None, 2]
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS[:6])
def test_the_default_encoder_refuses_bad_arguments_before_the_model_is_loaded(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        qwenvit.encode(noise(32, 64), model="no-such-model", device="cpu", **arguments)


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


def test_images_of_a_slow_source_do_not_wait_for_a_batch(demo, monkeypatch):
    """Where bits do not depend on the batch; elsewhere the batches are the same whatever the time."""
    monkeypatch.setattr(prefetch_module, "SLOW_SOURCE_SECONDS", 0.0)  # every source is slow
    images = [noise(32, 64, index) for index in range(6)]
    drawn = []

    def source():
        for index, image in enumerate(images):
            drawn.append(index)
            yield image

    def images_ahead():
        drawn.clear()
        return [len(drawn) - number for number, _ in enumerate(demo.iter_encode(source(), **SMALL_IMAGES), 1)]

    assert images_ahead() == [6 - number for number in range(1, 7)]  # one batch
    monkeypatch.setattr(Encoder, "is_batch_invariant", lambda _: True)
    assert max(images_ahead()) <= 2 * 4  # those in preparation
    for num_workers in (0, 1):
        drawn.clear()
        for number, item in enumerate(demo.iter_encode(source(), num_workers=num_workers, **SMALL_IMAGES)):
            assert len(drawn) <= number + 1 + 2 * num_workers
            torch.testing.assert_close(item.tokens, demo.encode(images[number], **SMALL_IMAGES)[0].tokens)


def test_a_broken_image_at_the_end_is_no_empty_list(demo):
    with pytest.warns(UserWarning, match=r"skipped images\[1\]: expected a PIL image"):
        out = demo.encode([noise(32, 64), None], on_error="skip", **SMALL_IMAGES)
    assert [item is None for item in out] == [False, True]


def test_the_same_broken_image_is_warned_of_in_every_call(demo):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            demo.encode([b"broken"], on_error="skip")
    assert [str(warning.message).split(":")[0] for warning in shown] == ["skipped images[0]"] * 3


def test_an_unknown_option_is_named(demo):
    with pytest.raises(TypeError, match="got device"):
        demo.encode(noise(32, 64), device="cpu")


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


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("CUDA error"), AttributeError()]
)
def test_what_is_no_fault_of_an_image_is_not_skipped(demo, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("qwenvit.preprocess.image_processor.smart_resize", fail)
    with pytest.raises(type(error)):
        demo.encode([noise(32, 64)] * 2, on_error="skip")


@pytest.mark.parametrize("source_fails", [False, True])
@pytest.mark.parametrize("num_workers", WORKERS)
def test_an_error_keeps_no_image(demo, monkeypatch, source_fails, num_workers):
    """No cycle of references may, nor keep the error: a batch on a GPU would stay there until garbage is collected."""
    references, compute = [], image_processor.compute_on_host

    def watched(frames, **options):
        prepared = compute(frames, **options)
        references.append(weakref.ref(prepared))
        return prepared

    def errors():
        return sum(type(one) in (LookupError, ValueError) for one in gc.get_objects())

    def watched_snapshot(image):
        copy = snapshot(image)
        if not isinstance(copy, bytes):
            references.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(image_processor, "compute_on_host", watched)
    monkeypatch.setattr(input_stream, "snapshot", watched_snapshot)

    def source():
        yield from (noise(32, 64, index) for index in range(6))
        if source_fails:
            raise LookupError
        yield b"broken"

    gc.collect()
    before = errors()
    gc.disable()
    try:
        with pytest.raises((LookupError, ValueError)):
            demo.encode(source(), num_workers=num_workers, **SMALL_IMAGES)
        assert_no_prefetch_threads(collect_garbage=False)
        assert [reference() for reference in references] == [None] * 12
        assert errors() == before
    finally:
        gc.enable()


def test_skipping_everything_keeps_the_layers(demo):
    with pytest.warns(UserWarning, match="skipped"):
        nothing = demo.encode([b"broken"], on_error="skip")
    some = demo.encode(noise(32, 64), **SMALL_IMAGES)
    assert [layer.shape[1] for layer in nothing.deepstack] == [layer.shape[1] for layer in some.deepstack]
    assert len(nothing.packed) == sum(map(len, nothing.deepstack)) == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64, torch.float64])
def test_pixel_values_have_a_dtype_of_towers(demo, dtype):
    for processor, images in ((demo.image_processor, noise(32, 64)), (demo.video_processor, [noise(32, 64)] * 2)):
        with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16"):
            processor(images, dtype=dtype)


def test_a_progress_bar_waits_for_the_first_image(demo, capsys):
    stream = demo.iter_encode([noise(32, 64)] * 2, progress=True, **SMALL_IMAGES)
    assert capsys.readouterr().err == ""
    list(stream)
    assert "2/2" in capsys.readouterr().err
