import json
import socket

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from qwenvit.weights.hub import ranges, reader
from qwenvit.weights.hub.fetch import fetch_tower
from support.hub_server import Hub
from support.tiny_towers import FAMILIES, Tower, build


@pytest.fixture(params=FAMILIES, scope="session")
def tower(request: pytest.FixtureRequest) -> Tower:
    return build(request.param)


@pytest.fixture(scope="session")
def qwen3() -> Tower:
    return build("qwen3_vl", torch.bfloat16)


@pytest.fixture(scope="session")
def big() -> Tower:
    """A tower of about 2 MB; the checkpoint adds 8 MB of language model."""
    widths = {"hidden_size": 128, "intermediate_size": 512, "out_hidden_size": 256}
    return build("qwen3_vl", torch.bfloat16, **widths)


@pytest.fixture(scope="session")
def size(big) -> int:
    return sum(tensor.nbytes for tensor in big.state.values())


@pytest.fixture
def hub(big, tmp_path, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()
    vision = big.model.config.to_dict()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "vision_config": vision}))
    (folder / "preprocessor_config.json").write_text('{"patch_size": 4}')
    save_file(big.composite() | {"lm_head.weight": torch.ones(8 << 18)}, folder / "model.safetensors")
    monkeypatch.setattr(ranges, "CHUNK_BYTES", 128 << 10)
    monkeypatch.setattr(reader, "RETRY_WAITS_S", (0.0, 0.0, 0.0, 0.0))
    with Hub(folder) as hub:
        serve(hub, monkeypatch)
        yield hub


def serve(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # huggingface_hub reads HF_ENDPOINT when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def fetch(hub, tmp_path):
    return lambda **options: fetch_tower(hub.repo_id, **{"cache_dir": tmp_path / "cache", **options})


@pytest.fixture
def unplug(hub, monkeypatch):
    """A function that replaces the Hub by a closed port."""

    def unplug() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            hub.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        serve(hub, monkeypatch)

    return unplug
