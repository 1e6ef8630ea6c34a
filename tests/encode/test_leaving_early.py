"""Streams that are left early, interrupted or never started: no thread stays, and the interpreter ends."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvit import encoder as encoder_module
from support.image_streams import SMALL_IMAGES, WORKERS, assert_same, noise, one_at_a_time
from support.prefetch_threads import assert_no_prefetch_threads, prefetch_threads

ROOT = Path(__file__).parents[2]


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
