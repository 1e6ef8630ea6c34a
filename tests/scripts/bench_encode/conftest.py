"""A small folder of pictures, and the bench for it."""

import pytest

from support.small_encode_bench import small_bench, small_files


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return small_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def bench():
    return small_bench()
