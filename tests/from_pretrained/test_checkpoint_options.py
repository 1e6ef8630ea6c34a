"""The options that choose a checkpoint: the same for the default encoder and the command line, and refused by name."""

import json
import warnings

import pytest
import torch

import qwenvit
from qwenvit import cli, default_encoder
from support.tiny_adapters import differing
from support.written_towers import SINGLE, link, load, write


@pytest.mark.parametrize("option", ["subfolder", "config", "family", "prefix", "adapter"])
def test_the_demo_has_no_checkpoint_to_choose(option):
    with pytest.raises(ValueError, match=f"{option}: expected None with model='demo'"):
        load("demo", **{option: "x"})


def test_the_default_encoder_takes_the_same_options(tmp_path, adapted):
    folder, _, after = adapted
    file = tmp_path / "alone.safetensors"
    file.symlink_to(folder / "base" / SINGLE)
    (tmp_path / "preprocessor_config.json").symlink_to(folder / "base" / "preprocessor_config.json")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    config = json.loads((folder / "base" / "config.json").read_text())
    options = {"model": file, "device": "cpu", "config": config, "adapter": folder / "adapter"}
    qwenvit.encode(image, **options)
    encoder = default_encoder._current["encoder"]
    assert differing(encoder.tower.state_dict(), after) == []
    qwenvit.encode(image, **options | {"config": json.loads(json.dumps(config))})
    assert default_encoder._current["encoder"] is encoder
    qwenvit.encode(image, **options | {"adapter": False})
    assert default_encoder._current["encoder"] is not encoder
    assert differing(default_encoder._current["encoder"].tower.state_dict(), after) != []


def test_the_command_line_takes_the_same_options(tmp_path, adapted, capsys):
    folder, before, after = adapted
    link(tmp_path, folder / "base", folder / "adapter")
    fetch = ["fetch", str(tmp_path.parent), "--subfolder", tmp_path.name]
    for options, expected in (([], after), (["--no-adapter"], before), (["--adapter", str(folder / "adapter")], after)):
        output = tmp_path / f"out{len(options)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cli.main([*fetch, str(output), *options]) == 0
        assert differing(load(output).tower.state_dict(), expected) == []
    family = load(folder / "base").config.family
    alone = tmp_path / "elsewhere" / "x.safetensors"
    alone.parent.mkdir()
    alone.symlink_to(folder / "base" / SINGLE)
    (alone.parent / "preprocessor_config.json").symlink_to(folder / "base" / "preprocessor_config.json")
    config = str(folder / "base" / "config.json")
    assert cli.main(["info", str(alone), "--config", config, "--family", family, "--load"]) == 0
    assert "loaded" in capsys.readouterr().out
    assert cli.main(["info", str(alone), "--config", config, "--load", "--prefix", "nowhere"]) == 1
    assert "prefix: expected one with vision tensors" in capsys.readouterr().err


def test_options_of_a_wrong_type_are_named(tmp_path, qwen3):
    write(tmp_path, qwen3)
    with pytest.raises(TypeError, match="prefix: expected a string or None, got 3"):
        load(tmp_path, prefix=3)
    with pytest.raises(ValueError, match=r"^family: expected one of .*got 'qwen9'"):
        load(tmp_path, family="qwen9")


def test_the_command_line_takes_no_checkpoint_options_with_the_demo(capsys):
    assert cli.main(["info", "demo", "--family", "qwen3_vl"]) == 1
    assert "family: expected None with model='demo'" in capsys.readouterr().err
