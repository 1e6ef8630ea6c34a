"""The options of `Encoder.from_pretrained` for repositories of the Hub: which folder, which tower, which config."""

import pytest
from safetensors.torch import save_file

from qwenvit.encoder import Encoder
from support.tiny_adapters import differing
from support.tiny_towers import Tower

SINGLE = "model.safetensors"


@pytest.fixture
def load(hub, tmp_path):
    options = {"cache_dir": tmp_path / "cache", "device": "cpu", "dtype": "auto"}
    return lambda **more: Encoder.from_pretrained(hub.repo_id, **options, **more)


def assert_loaded(encoder: Encoder, tower: Tower) -> None:
    assert differing(encoder.tower.state_dict(), tower.canonical) == []


def test_a_subfolder_is_loaded(hub, load, big):
    inside = hub.folder / "text_encoder"
    inside.mkdir()
    for file in [file for file in hub.folder.iterdir() if file.is_file()]:
        file.rename(inside / file.name)
    with pytest.raises(FileNotFoundError):
        load()
    assert_loaded(load(subfolder="text_encoder"), big)
    assert_loaded(load(subfolder="text_encoder", local_files_only=True), big)


def test_of_two_towers_the_chosen_one_is_loaded(hub, load, big):
    ema = {f"ema.visual.{name}": -tensor for name, tensor in big.state.items()}
    save_file(big.composite("visual.") | ema, hub.folder / SINGLE)
    with pytest.raises(ValueError, match="choose one by prefix="):
        load()
    for options in ({}, {"local_files_only": True}):
        assert_loaded(load(prefix="visual", **options), big)
        negative = load(prefix="ema.visual.", **options).tower.state_dict()
        assert differing({name: -tensor for name, tensor in negative.items()}, big.canonical) == []


def test_a_config_stands_in_for_the_absent_one(hub, load, big):
    (hub.folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load()
    config = big.model.config.to_dict() | {"model_type": "new"}
    for options in ({}, {"local_files_only": True}):
        assert_loaded(load(config=config, **options), big)
        assert_loaded(load(config=config, family="qwen3_vl", **options), big)


def test_an_incomplete_tower_is_not_downloaded(hub, load, big):
    save_file({n: t for n, t in big.composite("vlm.visual.").items() if "merger.norm" not in n}, hub.folder / SINGLE)
    with pytest.raises(ValueError, match=r"incomplete vision tower under vlm\.visual\. .*vlm\.visual\.merger\.norm"):
        load()
    assert hub.tensor_bytes() < (256 << 10) + 1  # the header alone
