"""Broken images in a stream: skipped with a warning of each, or raised in their turn."""

import re
import warnings

import pytest
import torch

from qwenvit import encoder as encoder_module
from support.image_streams import SMALL_IMAGES, WORKERS, assert_same, broken_list, noise
from support.prefetch_threads import assert_no_prefetch_threads


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
        with pytest.raises(ValueError, match=broken[50].replace(r"\[50\]", r"\[46\]")):
            items.extend(stream)
        assert len(items) == 46
        with pytest.raises(StopIteration):
            next(stream)
    for index, error in ((51, FileNotFoundError), (120, TypeError), (199, ValueError)):
        with pytest.raises(error, match=broken[index].replace(rf"\[{index}\]", r"\[1\]")):
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


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("CUDA error"), AttributeError()]
)
def test_what_is_no_fault_of_an_image_is_not_skipped(demo, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("qwenvit.preprocess.image_processor.smart_resize", fail)
    with pytest.raises(type(error)):
        demo.encode([noise(32, 64)] * 2, on_error="skip")


def test_skipping_everything_keeps_the_layers(demo):
    with pytest.warns(UserWarning, match="skipped"):
        nothing = demo.encode([b"broken"], on_error="skip")
    some = demo.encode(noise(32, 64), **SMALL_IMAGES)
    assert [layer.shape[1] for layer in nothing.deepstack] == [layer.shape[1] for layer in some.deepstack]
    assert len(nothing.packed) == sum(map(len, nothing.deepstack)) == 0
