"""What jobs in this process take: a loaded encoder and a few pictures."""

import warnings

import pytest

from qwenvit.encoder import Encoder
from support.jobs import make_pictures


@pytest.fixture(scope="module")
def encoder():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Encoder.from_pretrained("demo", device="cpu")


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / "pictures", 7)
