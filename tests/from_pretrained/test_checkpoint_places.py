"""Where towers are, and in what form: prefixes, subfolders, the Hub's cache, shards, and formats that are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.tiny_adapters import differing
from support.tiny_towers import Tower, save_sharded
from support.written_towers import SINGLE, assert_loaded, load, write

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.mark.parametrize("prefix", ["vlm.visual.", "base_model.model.model.visual.", "vision_tower.", ""])
def test_any_prefix(tmp_path, tower, prefix):
    assert_loaded(load(write(tmp_path, tower, prefix)), tower)


def test_a_subfolder_of_a_pipeline(tmp_path, tower, capsys):
    write(tmp_path / "text_encoder", tower)
    (tmp_path / "model_index.json").write_text("{}")
    assert_loaded(load(tmp_path, subfolder="text_encoder"), tower)
    assert_loaded(load(tmp_path, subfolder="text_encoder/"), tower)
    with pytest.raises(FileNotFoundError, match=r"no folder 'vae'; it has: text_encoder"):
        load(tmp_path, subfolder="vae")
    with pytest.raises(ValueError, match=r"subfolder: .*a file"):
        load(tmp_path / "text_encoder" / SINGLE, subfolder="x")
    for outside in ("../x", "/etc", "a/../.."):
        with pytest.raises(ValueError, match="subfolder: expected a folder"):
            load(tmp_path, subfolder=outside)


def cache(folder: Path, tower: Tower, commits: list[str], main: str | None) -> Path:
    """Write a repository as huggingface_hub's cache has it: links into a folder of blobs."""
    repository = folder / "models--org--name"
    for commit in commits:
        snapshot = repository / "snapshots" / commit
        write(repository / "blobs" / commit, tower)
        snapshot.mkdir(parents=True)
        for name in (SINGLE, "config.json"):
            (snapshot / name).symlink_to(f"../../blobs/{commit}/{name}")
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


@pytest.mark.parametrize(("commits", "main"), [([COMMIT], None), ([COMMIT, OTHER], COMMIT), ([OTHER, COMMIT], COMMIT)])
def test_a_folder_of_the_hubs_cache(tmp_path, qwen3, commits, main):
    repository = cache(tmp_path, qwen3, commits, main)
    snapshot = repository / "snapshots" / COMMIT
    for other in set(commits) - {COMMIT}:
        (repository / "snapshots" / other / SINGLE).unlink()
    for path in (repository, snapshot, snapshot / SINGLE, f"{repository}/"):
        assert_loaded(load(path), qwen3)
    with pytest.raises(ValueError, match=r"revision: expected None with a local folder"):
        load(repository, revision="v2")


def test_several_snapshots_without_a_branch_are_refused_and_listed(tmp_path, qwen3):
    repository = cache(tmp_path, qwen3, [COMMIT, OTHER], None)
    with pytest.raises(ValueError, match="2") as error:
        load(repository)
    assert str(repository / "snapshots" / COMMIT) in str(error.value)
    assert str(repository / "snapshots" / OTHER) in str(error.value)


def test_of_two_towers_one_is_chosen_by_prefix(tmp_path, tower):
    write(tmp_path, tower, "visual.")
    ema = {f"ema.visual.{name}": -tensor for name, tensor in tower.state.items()}
    save_file(ema | tower.composite("visual."), tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"got 2 under .*: choose one by prefix="):
        load(tmp_path)
    assert_loaded(load(tmp_path, prefix="visual"), tower)
    negative = load(tmp_path, prefix="ema.visual.").tower.state_dict()
    assert differing({name: -tensor for name, tensor in negative.items()}, tower.canonical) == []


def test_a_quantised_language_model_beside_a_plain_tower(tmp_path, qwen3):
    write(tmp_path, qwen3)
    text = {
        "model.language_model.layers.0.mlp.up_proj.weight": torch.ones(16, 16).to(torch.float8_e4m3fn),
        "model.language_model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
    }
    tensors = qwen3.composite() | text
    (tmp_path / SINGLE).unlink()
    save_sharded(tmp_path, tensors, {name: index % 3 for index, name in enumerate(tensors)})
    assert_loaded(load(tmp_path), qwen3)


def test_channels_last_convolutions(tmp_path, tower):
    write(tmp_path, tower)
    tensors = tower.composite("vision_tower.")
    name = "vision_tower.patch_embed.proj.weight"
    save_file(tensors | {name: tensors[name].movedim(1, -1).contiguous()}, tmp_path / SINGLE)
    assert_loaded(load(tmp_path), tower)


@pytest.mark.parametrize(("name", "told"), [("model.gguf", "GGUF"), ("pytorch_model.bin", "pickle")])
def test_another_format_without_a_config_is_named(tmp_path, name, told):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("{}")
    for model in (tmp_path, tmp_path / name):
        (tmp_path / name).write_bytes(b"GGUF\x03" + bytes(60) if "gguf" in name else b"PK\x03\x04" + bytes(60))
        with pytest.raises(ValueError, match=rf"only safetensors files are read.*{told}"):
            load(model)
