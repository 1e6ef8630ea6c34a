"""From a repository's name to embeddings through the command line, against a local Hub server."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.hf_towers import build_tower, forward, save_tower
from qwenvit.encoder import Encoder
from qwenvit.preprocess.image_processor import ImageProcessor
from support.hub_server import Hub
from support.towers import SMALL

ROOT = Path(__file__).parents[2]
CONFIG = replace(SMALL["qwen3_vl"], depth=2, deepstack_visual_indexes=(0,))


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    tower = build_tower(CONFIG)
    save_tower(tower, CONFIG, folder)
    processor = ImageProcessor.for_family("qwen3_vl").with_bounds(max_pixels=100_000)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.to_hf()))
    with Hub(folder) as hub:
        yield hub, tower


def qwenvit(hub, home, *arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", "import sys; from qwenvit.cli import main; sys.exit(main())", *map(str, arguments)],
        env=clean | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_fetch_once_then_encode_without_the_network(served, tmp_path):
    hub, tower = served
    image = tmp_path / "image.png"
    Image.linear_gradient("L").resize((400, 300)).convert("RGB").save(image)
    done = qwenvit(hub, tmp_path / "home", "fetch", hub.repo_id, tmp_path / "tower")
    assert done.returncode == 0, done.stderr
    hub.requests.clear()
    done = qwenvit(
        hub,
        tmp_path / "home",
        "encode",
        image,
        "-m",
        hub.repo_id,
        "-o",
        tmp_path / "out",
        "--device",
        "cpu",
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    enc = Encoder.from_pretrained(tmp_path / "tower", device="cpu")
    pixel_values, grid = enc.image_processor(image)
    assert grid.prod() * 16 * 16 <= 100_000  # the repository's own preprocessor_config.json counts
    tokens = load_file(tmp_path / "out" / "00000.safetensors")["image.png/tokens"]
    torch.testing.assert_close(tokens, forward(tower, pixel_values, grid)[1], rtol=1e-4, atol=1e-4)


def test_info_downloads_no_weights(served, tmp_path):
    hub, _ = served
    done = qwenvit(hub, tmp_path / "home", "info", hub.repo_id)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    asked = [request.path for request in hub.requests]
    assert any(path.endswith("/config.json") for path in asked)
    assert not any("safetensors" in path for path in asked)


def test_a_missing_repository_is_a_one_line_error(served, tmp_path):
    hub, _ = served
    done = qwenvit(hub, tmp_path / "home", "info", "org/other", "--load")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "qwenvit: error: org/other (main): no such repository" in done.stderr
