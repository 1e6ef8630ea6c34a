"""Setup shared by the tests of encoding: the demo's encoder, and a look for threads that a test left."""

import warnings

import pytest

from qwenvit.encoder import Encoder
from support.prefetch_threads import assert_no_prefetch_threads


@pytest.fixture(scope="module")
def demo():
    with warnings.catch_warnings(action="ignore"):
        return Encoder.from_pretrained("demo", device="cpu")


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert_no_prefetch_threads()
