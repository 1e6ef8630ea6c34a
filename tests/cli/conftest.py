"""A folder of photos for the tests of `qwenvit encode`."""

import pytest
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.linear_gradient("L").rotate(40 * number).resize((64, 64)).convert("RGB").save(folder / f"{number}.png")
    return folder
