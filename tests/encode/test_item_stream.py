"""`encode_stream`: items in order beside their embeddings, and the reason of each that failed."""

import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit.busy_clock import BusyClock
from qwenvit.item_stream import encode_stream

OPTIONS = {"min_pixels": 1024}


def noise(index):
    height, width = 33 + 17 * (index % 5), 40 + 23 * (index % 3)
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("max_patches", [1, 40, None])
def test_each_item_is_beside_its_own_embeddings_or_its_error(demo, tmp_path, num_workers, max_patches):
    (tmp_path / "broken.png").write_bytes(b"no picture")

    def open_item(item):
        if item % 5 == 2:
            raise ValueError(f"no content in {item}")
        if item % 5 == 4:
            return tmp_path / ("broken.png" if item % 2 else "missing.png")
        return noise(item)

    def items():
        yield from range(17)  # a generator, which can be drawn once

    seen = []
    with warnings.catch_warnings(action="error"):  # errors are told, not warned of
        options = {"num_workers": num_workers, "max_patches": max_patches, **OPTIONS}
        batches = list(encode_stream(demo, items(), open_item, **options))
    for batch in batches:
        assert len(batch.items) == len(batch.embeddings)
        for position, (item, found) in enumerate(zip(batch.items, batch.embeddings, strict=True)):
            seen.append(item)
            error = batch.embeddings.errors.get(position)
            assert (found is None) == (error is not None) == (item % 5 in (2, 4)), item
            if item % 5 == 2:
                assert str(error) == f"no content in {item}"
            elif item % 5 == 4:
                assert "images[" not in str(error)
                assert ("broken.png" if item % 2 else "missing.png") in str(error)
            else:
                pixels, grid = demo.image_processor(noise(item), **OPTIONS)
                torch.testing.assert_close(found.tokens, demo(pixels, grid).pooler_output, rtol=1e-4, atol=1e-5)
                if max_patches == 1:
                    assert torch.equal(found.tokens, demo(pixels, grid).pooler_output)
    assert seen == list(range(17))
    images = [sum(item is not None for item in batch.embeddings) for batch in batches]
    assert max(images) == 1 if max_patches == 1 else max(images) > 1


def test_items_are_opened_in_the_decoding_threads_and_drawn_in_the_callers(demo):
    opened, drawn = set(), set()

    def items():
        for item in range(6):
            drawn.add(threading.current_thread())
            yield item

    def open_item(item):
        opened.add(threading.current_thread())
        return noise(item)

    assert sum(len(batch.items) for batch in encode_stream(demo, items(), open_item, num_workers=2, **OPTIONS)) == 6
    assert drawn == {threading.current_thread()}
    assert threading.current_thread() not in opened


def test_no_items_are_no_batches(demo):
    assert list(encode_stream(demo, [], noise)) == []


def test_what_is_no_fault_of_an_item_is_raised_after_the_batches_before_it(demo):
    def open_item(item):
        if item == 3:
            raise KeyError("a bug")
        return noise(item)

    found = []
    with pytest.raises(KeyError, match="a bug"):
        found.extend(batch.items for batch in encode_stream(demo, range(6), open_item, max_patches=1, **OPTIONS))
    assert found == [[0], [1], [2]]


def test_bad_arguments_are_refused_at_the_call(demo):
    with pytest.raises(TypeError, match="min_pixel"):
        encode_stream(demo, [], noise, min_pixel=5)
    with pytest.raises(ValueError, match="num_workers"):
        encode_stream(demo, [], noise, num_workers=-1)


def test_leaving_early_ends_the_threads(demo):
    batches = encode_stream(demo, iter(range(10**9)), noise, num_workers=2, max_patches=1, **OPTIONS)
    assert next(batches).items == [0]
    batches.close()


def test_the_last_blocks_states_are_kept_on_request(demo):
    (batch,) = encode_stream(demo, [1, 2], noise, keep_patches=True, **OPTIONS)
    truth = demo(*demo.image_processor([noise(1), noise(2)], **OPTIONS))
    torch.testing.assert_close(batch.embeddings.last_hidden_state, truth.last_hidden_state)
    (batch,) = encode_stream(demo, [1, 2], noise, **OPTIONS)
    assert batch.embeddings.last_hidden_state is None


def test_the_clock_counts_the_towers_time_alone(demo, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("qwenvit.busy_clock.time.perf_counter", lambda: now[0])
    run = demo._run

    def slow(*arguments):
        now[0] += 2
        return run(*arguments)

    def open_item(item):
        now[0] += 1000
        return noise(item)

    monkeypatch.setattr(demo, "_run", slow)
    clock = BusyClock()
    batches = list(encode_stream(demo, range(3), open_item, num_workers=0, max_patches=1, clock=clock, **OPTIONS))
    assert len(batches) == 3
    assert clock.seconds() == 6
    assert BusyClock().seconds() == 0


def test_files_are_opened_as_pillow_opens_them(demo, tmp_path):
    Image.fromarray(noise(4)).save(tmp_path / "a.png")
    (batch,) = encode_stream(demo, ["a.png"], lambda name: tmp_path / name, max_patches=1, **OPTIONS)
    assert torch.equal(batch.embeddings[0].tokens, demo(*demo.image_processor(noise(4), **OPTIONS)).pooler_output)
