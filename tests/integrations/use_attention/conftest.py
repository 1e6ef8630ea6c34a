"""A tiny model, and the calls of the attention that use_attention puts into it."""

import pytest
import torch

from qwenvit.integrations.transformers import attention as integration
from support.use_attention import build_wide


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: at these sizes, several threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def qwen3():
    return build_wide("qwen3_vl")


@pytest.fixture
def calls(monkeypatch):
    """The queries of each call of our attention."""
    calls = []

    def spy(q, *arguments, **options):
        calls.append(q)
        return rope_attention(q, *arguments, **options)

    rope_attention = integration.ops.rope_attention
    monkeypatch.setattr(integration.ops, "rope_attention", spy)
    return calls
