import pytest
import torch
from tiny_towers import FAMILIES, Tower, build


@pytest.fixture(params=FAMILIES, scope="session")
def tower(request: pytest.FixtureRequest) -> Tower:
    return build(request.param)


@pytest.fixture(scope="session")
def qwen3() -> Tower:
    return build("qwen3_vl", torch.bfloat16)
