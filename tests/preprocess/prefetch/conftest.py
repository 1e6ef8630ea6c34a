"""Setup shared by the tests of prefetching: a look for threads that a test left."""

import pytest

from support.prefetch_threads import assert_no_prefetch_threads


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert_no_prefetch_threads()
