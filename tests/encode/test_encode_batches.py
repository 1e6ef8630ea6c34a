"""An image's embeddings are the same whatever the batches, the workers, the calling threads and the source's pace."""

import threading

import pytest
import torch
from PIL import Image

from qwenvit import encoder as encoder_module
from qwenvit.encoder import Encoder
from qwenvit.preprocess import prefetch as prefetch_module
from qwenvit.towers.reference import ReferenceTower
from support.image_streams import SMALL_IMAGES, WORKERS, assert_same, noise, one_at_a_time
from support.towers import narrow


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
