"""Set-up shared by all tests."""

import pytest
import torch
from torchvision_cpu import define_torchvision_schemas

define_torchvision_schemas()  # before transformers imports torchvision


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """The same number of threads everywhere: a sum's order, and so its last bit, may depend on it."""
    torch.set_num_threads(2)
