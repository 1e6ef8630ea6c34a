"""Towers in a folder of a repository, adapters beside them, and one of several towers."""

import json
import shutil

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

from qwenvit.towers.checkpoint import load_tower
from qwenvit.weights.hub.fetch import fetch_adapter, fetch_config, fetch_tower
from qwenvit.weights.local import find_tensors, load_tensors
from support.tiny_adapters import base_model, differing, merged_by_peft, wrap

NAME, WEIGHT = "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight", torch.arange(600_000.0)


@pytest.fixture
def pipeline(hub):
    """The repository of a pipeline: the checkpoint is in its folder text_encoder."""
    (hub.folder / "text_encoder").mkdir()
    for file in [*hub.folder.iterdir()]:
        if file.is_file():
            shutil.move(file, hub.folder / "text_encoder" / file.name)
    (hub.folder / "model_index.json").write_text("{}")
    return hub


def put_adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({NAME: WEIGHT}, folder / "adapter_model.safetensors")


def assert_adapter(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {*tensors} == {NAME}
    assert torch.equal(tensors[NAME], WEIGHT)


def test_a_tower_in_a_subfolder(pipeline, fetch, big, tmp_path):
    tower = fetch(subfolder="text_encoder")
    assert tower.name == "text_encoder"
    assert tower.parent.name == "a" * 40
    loaded = load_tensors(find_tensors(tower), big.expected, family=big.family)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in big.canonical.items())
    pipeline.requests.clear()
    options = {"subfolder": "text_encoder", "cache_dir": tmp_path / "cache"}
    assert fetch(subfolder="text_encoder/", local_files_only=True) == tower
    assert fetch_config("org/model", **options) == fetch_config("org/model", local_files_only=True, **options) == tower
    assert not pipeline.requests
    with pytest.raises(FileNotFoundError, match=r"expected one of .* got model_index\.json"):
        fetch()
    with pytest.raises(FileNotFoundError, match=r"org/model/vae: expected one of .* got no files"):
        fetch(subfolder="vae")


def test_a_snapshots_subfolder(pipeline, fetch, tmp_path):
    for file in (pipeline.folder / "text_encoder").iterdir():
        cached = hf_hub_download("org/model", f"text_encoder/{file.name}", cache_dir=tmp_path / "cache")
    pipeline.requests.clear()
    found = fetch(subfolder="text_encoder")
    assert str(found) == cached.rpartition("/")[0]
    assert not pipeline.requests


def test_an_adapter_beside_the_tower_is_kept(hub, fetch, monkeypatch):
    put_adapter(hub.folder)
    tower = fetch()
    assert_adapter(tower)
    assert json.loads((tower / "adapter_config.json").read_text()) == {"peft_type": "LORA"}
    (tower / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json without adapter_model.safetensors"):
        fetch(local_files_only=True)
    hub.requests.clear()
    assert fetch() == tower
    assert (tower / "adapter_model.safetensors").is_file()


def test_an_adapter_whose_weights_are_absent_is_refused(hub, fetch):
    put_adapter(hub.folder)
    (hub.folder / "adapter_model.safetensors").rename(hub.folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected one of adapter_model.safetensors, got .*adapter_model.bin"):
        fetch()


def test_a_repository_of_an_adapter_alone(hub, fetch, tmp_path):
    put_adapter(hub.folder)
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"an adapter without the weights that it changes.*pass this one as adapter="):
        fetch()
    (hub.folder / "config.json").unlink()
    options = {"cache_dir": tmp_path / "cache"}
    adapter = fetch_adapter("org/model", **options)
    hub.requests.clear()
    assert fetch_adapter("org/model", local_files_only=True, **options) == adapter
    assert not hub.requests
    assert_adapter(adapter)
    with pytest.raises(FileNotFoundError, match="its adapter is not complete on this machine"):
        fetch_adapter("org/model", subfolder="other", local_files_only=True, **options)


def test_a_repository_without_a_config_is_fetched_if_none_is_needed(hub, fetch):
    (hub.folder / "config.json").unlink()
    tower = fetch(needs_config=False)
    hub.requests.clear()
    assert fetch(needs_config=False) == tower
    assert not hub.requests
    with pytest.raises(FileNotFoundError, match=r"has no file .*config.json"):
        fetch()


def test_one_of_several_towers_is_chosen_by_its_prefix(hub, fetch, big):
    negative = {f"other.visual.{name}": -tensor for name, tensor in big.state.items()}
    save_file(big.composite() | negative, hub.folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"got 2 under .*prefix="):
        fetch()
    first, second = fetch(prefix=big.prefix), fetch(prefix="other.visual")
    assert first != second
    assert fetch(prefix="other.visual.", local_files_only=True) == second
    for folder, prefix, sign in ((first, big.prefix, 1), (second, "other.visual.", -1)):
        state = load_file(folder / "model.safetensors")
        assert {*state} == {prefix + name for name in big.state}
        assert all(torch.equal(state[prefix + name], sign * tensor) for name, tensor in big.state.items())
        assert find_tensors(folder, prefix).keys() == state.keys()


def test_two_repositories_do_not_share_a_place(hub, fetch, tmp_path):
    fetch()
    hub.repo_id = "org/other"
    hub.requests.clear()
    assert fetch_tower("org/other", cache_dir=tmp_path / "cache").parent.name == "org--other"
    assert hub.tensor_requests()


def test_a_tower_without_the_adapter_beside_it(hub, fetch):
    put_adapter(hub.folder)
    tower = fetch(with_adapter=False)
    assert not (tower / "adapter_model.safetensors").exists()
    assert fetch(with_adapter=False, local_files_only=True) == tower
    hub.requests.clear()
    assert fetch() == tower
    assert_adapter(tower)
    assert not any("/model.safetensors" in request.path for request in hub.requests)
    (hub.folder / "adapter_model.safetensors").rename(hub.folder / "adapter_model.bin")
    hub.revisions["main"] = "b" * 40
    assert fetch(with_adapter=False, force_download=True).name == "b" * 40


def test_an_adapter_that_is_unmerged_in_the_checkpoint(hub, fetch, tmp_path):
    """The file keeps full names, which the adapter's settings mean (`alpha_pattern`)."""
    model = base_model("qwen3_vl")
    wrapped = wrap(model, target_modules=["qkv"], r=2, alpha_pattern={"model.visual.blocks.0.attn.qkv": 64})
    wrapped.save_pretrained(tmp_path / "adapter")
    for file in hub.folder.iterdir():
        file.unlink()
    model.config.save_pretrained(hub.folder)
    # As saved without merging, the adapter's name is in its tensors' names.
    tensors = {name: tensor.contiguous().clone() for name, tensor in wrapped.base_model.model.state_dict().items()}
    save_file(tensors, hub.folder / "model.safetensors")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", hub.folder)
    tower = load_tower(fetch(), impl="reference", device=torch.device("cpu"), dtype=torch.float32)
    assert differing(tower.state_dict(), merged_by_peft(base_model("qwen3_vl"), tmp_path / "adapter")) == []


@pytest.mark.parametrize(("name", "told"), [("model.gguf", "GGUF"), ("pytorch_model.bin", "pickle")])
def test_a_repository_of_another_format_is_named_as_such(hub, fetch, name, told):
    for file in hub.folder.iterdir():
        file.unlink()
    (hub.folder / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=told):
        fetch()
