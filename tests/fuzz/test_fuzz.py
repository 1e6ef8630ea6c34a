"""A few seconds of each fuzzer, and the frame itself: it must see each kind of failure."""

import sys

import pytest

from fuzz import frame
from fuzz.run import FUZZERS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the frame measures memory in /proc")


@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_damaged_input_harms_nothing(fuzzer):
    report = frame.fuzz(fuzzer, seed=19, count=60)
    assert report.failures == []
    assert report.counts[frame.EQUAL] > 0
    assert report.counts[frame.REFUSED] > 0


def test_the_frame_sees_every_failure():
    report = frame.fuzz("failures", seed=0, count=14)
    assert report.counts == {
        frame.EQUAL: 2,
        frame.REFUSED: 2,
        frame.CRASH: 3,
        frame.HANG: 1,
        frame.UNDOCUMENTED: 4,
        frame.DIFFERENT: 1,
        frame.MEMORY: 1,
    }
    assert "failures --seed 0 --case 3: crash: killed\nSIGKILL" in report.failures
    assert report.peak_bytes > frame.MEMORY_BYTES


def test_a_broken_fuzzer_ends_the_run():
    with pytest.raises(RuntimeError, match="the fuzzer failures is broken"):
        frame.fuzz("failures", seed=1, count=3)
