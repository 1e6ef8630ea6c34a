"""Setup shared by the tests of kernels."""

import pytest
import torch


@pytest.fixture
def outputs_full_of_nan():
    """Seed torch, and let it fill new tensors with NaN, which shows elements that a kernel does not write."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
