"""Setup shared by the tests of encoding: the demo's encoder, and a look for threads that a test left."""

import pytest

from support.demo import demo_encoder
from support.prefetch_threads import assert_no_prefetch_threads


@pytest.fixture(scope="module")
def demo():
    return demo_encoder()


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert_no_prefetch_threads()
