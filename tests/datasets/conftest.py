"""What jobs in this process take: a loaded encoder and a few pictures."""

import pytest

from support.demo import demo_encoder
from support.jobs import make_pictures


@pytest.fixture(scope="module")
def encoder():
    return demo_encoder()


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / "pictures", 7)
