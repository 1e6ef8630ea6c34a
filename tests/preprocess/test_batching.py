"""Batches of prepared images: consecutive, within limits, as long as these allow."""

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvit.preprocess import batching
from qwenvit.preprocess.batching import batches
from qwenvit.preprocess.prefetch import WAITING, Prefetched

FAILED = None
IMAGES = st.lists(st.one_of(st.just(FAILED), st.tuples(st.integers(1, 6), st.integers(1, 60))), max_size=9)
"""Half the rows of a grid of two columns, and bytes; None for an image that failed."""


def prefetched(images):
    """Return images as `prefetch` yields them."""
    outcomes = []
    for index, image in enumerate(images):
        if image is FAILED:
            outcomes.append(Prefetched(index, None, ValueError(index)))
        else:
            outcomes.append(Prefetched(index, SimpleNamespace(grid=(1, 2 * image[0], 2), num_bytes=image[1]), None))
    return outcomes


def fits(batch, max_patches, max_bytes):
    good = [one.result for one in batch if one.result is not None]
    patches, num_bytes = sum(math.prod(one.grid) for one in good), sum(one.num_bytes for one in good)
    return len(good) <= 1 or (patches <= max_patches and num_bytes <= max_bytes)


def all_divisions(images):
    """Yield every division into consecutive batches."""
    for cuts in itertools.product((False, True), repeat=max(0, len(images) - 1)):
        ends = [index + 1 for index, cut in enumerate(cuts) if cut] + [len(images)]
        yield [images[start:end] for start, end in itertools.pairwise([0, *ends])]


@given(images=IMAGES, max_patches=st.integers(1, 60), max_bytes=st.integers(1, 150))
def test_each_batch_is_as_long_as_the_limits_allow(images, max_patches, max_bytes):
    """The truth: of all divisions whose batches fit, the one whose first batch is longest, then the second, ..."""
    images = prefetched(images)
    got = list(batches(iter(images), max_patches, max_bytes))
    assert [one for batch in got for one in batch] == images
    assert all(fits(batch, max_patches, max_bytes) for batch in got)
    if images:
        possible = [division for division in all_divisions(images)
                    if all(fits(batch, max_patches, max_bytes) for batch in division)]  # fmt: skip
        assert got == max(possible, key=lambda division: list(map(len, division)))
    else:
        assert got == []


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([(4, 1), (4, 1), (4, 1)], [2, 1]),  # 16 patches each, 32 at most
        ([(1, 60), (1, 40), (1, 1)], [2, 1]),  # 100 bytes at most
        ([(9, 1), (1, 1)], [1, 1]),  # 36 patches alone
        ([(1, 101), (1, 1)], [1, 1]),  # 101 bytes alone
        ([(8, 100), FAILED, FAILED, (1, 1)], [3, 1]),
        ([FAILED, FAILED, (9, 200), FAILED], [4]),
        ([FAILED] * 5, [5]),
    ],
)
def test_examples(images, expected):
    assert [len(batch) for batch in batches(prefetched(images), 32, 100)] == expected


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ([FAILED] * 3, [3]),
        ([FAILED] * 4, [3, 1]),
        ([(1, 1)] * 3, [3]),
        ([(1, 1)] * 7, [3, 3, 1]),
        ([FAILED, (1, 1), FAILED, (1, 1)], [3, 1]),
        ([(4, 1), (2, 1), (2, 1)], [3]),  # all of 32 patches too
        ([(1, 50), (1, 25), (1, 25)], [3]),  # all of 100 bytes too
    ],
)
def test_a_full_number_of_images_is_one_batch(images, expected, monkeypatch):
    monkeypatch.setattr(batching, "IMAGES_PER_BATCH", 3)
    assert [len(batch) for batch in batches(prefetched(images), 32, 100)] == expected


def test_a_batch_is_yielded_when_the_next_image_does_not_fit():
    images = iter(prefetched([(4, 1)] * 10))
    assert len(next(batches(images, 32, 100))) == 2
    assert next(images).position == 3


def test_a_batch_ends_where_a_slow_source_is_waited_for():
    one = Prefetched(0, SimpleNamespace(grid=(1, 2, 2), num_bytes=1), None)
    found = list(batches([one, one, WAITING, WAITING, one], 100, 100))
    assert found == [[one, one], [], [], [one]]


def test_a_run_of_failed_images_ends_batches_early():
    """Whoever reads a job's errors does not wait for thousands of them."""
    failed = [Prefetched(number, None, ValueError("broken")) for number in range(600)]
    sizes = [len(batch) for batch in batches(failed, 100, 100)]
    assert sizes == [256, 256, 88]
