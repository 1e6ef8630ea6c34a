"""What a stream keeps in memory: few images at a time, and none that was skipped or that an error is about."""

import gc
import itertools
import os
import weakref
from pathlib import Path

import numpy as np
import pytest

from qwenvit import encoder as encoder_module
from qwenvit import input_stream
from qwenvit.preprocess import image_processor
from qwenvit.preprocess import prefetch as prefetch_module
from qwenvit.preprocess.decode import snapshot
from support.image_streams import SMALL_IMAGES, WORKERS, noise
from support.prefetch_threads import assert_no_prefetch_threads


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
