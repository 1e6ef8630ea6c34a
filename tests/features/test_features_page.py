"""The Python of `qwenvit/features/README.md` and of the README's section on dense features, executed."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qwenvit
from qwenvit.cli.parser import _parser
from qwenvit.encoder import Encoder
from qwenvit.towers import demo
from qwenvit.towers.reference import ReferenceTower

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "qwenvit/features/README.md").read_text()
README = (ROOT / "README.md").read_text()
SHORT = README[README.index("## Dense features") :].partition("\n## ")[0]


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def noise(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippets take for granted: a narrow tower of the 27 blocks of Qwen3-VL-8B's, and files."""
    av = pytest.importorskip("av", reason="needs PyAV")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 40, "num_heads": 4}
    tower = ReferenceTower(replace(demo.CONFIG, depth=27, deepstack_visual_indexes=(8, 16, 24), **size))
    encoder = Encoder(tower)
    monkeypatch.setattr(Encoder, "from_pretrained", lambda *_, **__: encoder)
    for name, seed in (("cat.jpg", 0), ("dog.jpg", 1)):
        Image.fromarray(noise(288, 384, seed)).save(name)
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for seed in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(64, 64, seed))))
        container.mux(stream.encode())
    images = ["cat.jpg", Image.open("dog.jpg").crop((0, 0, 256, 256))]
    pixel_values, image_grid_thw = encoder.image_processor(images)
    known = {"qwenvit": qwenvit, "torch": torch, "images": images, "image": images[0], "enc": encoder}
    return known | {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}


def test_the_readme_draws_a_feature_map_in_four_lines(names):
    (snippet,) = snippets(SHORT)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 4
    assert len(SHORT.splitlines()) <= 12
    exec(snippet, names)
    assert [list(names[name].shape) for name in ("low", "middle", "last")] == [[18, 24, 32]] * 3
    with Image.open("features.png") as drawn:
        assert drawn.size == (384, 288)


def test_maps(names):
    exec(snippets(PAGE)[0], names)
    item = names["item"]
    assert (item.layers, item.grid) == ((8, 16, 27), (1, 18, 24))
    assert [list(one.maps[0].shape) for one in names["features"]] == [[18, 24, 32], [16, 16, 32]]


def of_section(title):
    """Return the snippet of a section of the page."""
    (snippet,) = snippets(PAGE[PAGE.index(f"## {title}\n") :].partition("\n## ")[0])
    return snippet


def test_attention_maps(names):
    exec(of_section("Attention maps"), names)
    maps = names["found"].maps
    assert [list(one.shape) for one in maps] == [[2, 1, 18, 24]] * 2
    torch.testing.assert_close(maps[0].sum((-1, -2)), torch.ones(2, 1))


def test_gradients(names):
    exec(of_section("Gradients"), names)
    assert names["image"].grad.shape == (3, 480, 640)
    assert names["image"].grad.abs().sum() > 0


def test_lora(names):
    pytest.importorskip("peft", reason="needs peft")
    names |= {"grid": names["image_grid_thw"], "loss_of": torch.sum}
    exec(of_section("LoRA"), names)
    with_gradients = {name for name, one in names["wrapped"].named_parameters() if one.grad is not None}
    assert len(with_gradients) == 27 * 2 * 2
    assert all("lora_" in name for name in with_gradients)
    assert Path("adapter/adapter_config.json").exists()


def test_timms_names(names):
    exec(of_section("timm's names").replace('device="cuda"', 'device="cpu"'), names)
    assert [list(one.shape) for one in names["maps"]] == [[2, 32, 28, 28]] * 3
    assert names["final"].shape == (2, 28 * 28, 32)


def test_commands_and_links():
    commands = re.findall(r"^qwenvit (picture [^#\n]*)", PAGE, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        assert _parser().parse_args(command.split()).command == "picture"
    scripts = set(re.findall(r"scripts/examples/\w+\.py", PAGE))
    assert scripts == {f"scripts/examples/{file.name}" for file in (ROOT / "scripts/examples").glob("*.py")} - {
        "scripts/examples/serve.py"
    }
