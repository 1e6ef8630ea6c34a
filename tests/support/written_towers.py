"""Checkpoints of tiny towers as folders: written, linked together, loaded, and compared with what was written."""

import json
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from qwenvit.encoder import Encoder
from support.tiny_adapters import differing
from support.tiny_towers import Tower

SINGLE = "model.safetensors"
load = partial(Encoder.from_pretrained, device="cpu")  # whose dtype is float32, as the tensors written here


def config_of(tower: Tower) -> dict[str, object]:
    return tower.model.config.to_dict()


def write(folder: Path, tower: Tower, prefix: str | None = None, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tower.composite(prefix), folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(config_of(tower) if config is None else config))
    return folder


def assert_loaded(encoder: Encoder, tower: Tower) -> None:
    assert encoder.config.family == tower.family
    assert differing(encoder.tower.state_dict(), tower.canonical) == []


def link(folder: Path, *sources: Path) -> Path:
    for source in sources:
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
    return folder
