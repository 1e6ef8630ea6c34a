"""Set-up shared by all tests."""

import os

import pytest
import torch

from common.torchvision_cpu import define_torchvision_schemas

define_torchvision_schemas()  # before transformers imports torchvision

# Without a GPU, Triton's kernels run in its interpreter, on CPU tensors. Triton decides at each `@triton.jit`, its own
# ones included, so this is said before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """The same number of threads everywhere: a sum's order, and so its last bit, may depend on it."""
    torch.set_num_threads(2)
