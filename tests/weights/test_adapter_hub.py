"""Adapters named by a folder, a file or a repository of the Hub."""

import pytest

from qwenvit.weights.adapters.adapter import ADAPTER_CONFIG, ADAPTER_FILE, OTHER_WEIGHTS, read_adapter
from qwenvit.weights.hub.adapter import locate_adapter
from support.tiny_adapters import base_model, differing, merged_by_peft, merged_by_us, wrap


@pytest.fixture
def served(hub):
    """A Hub whose repository has an adapter and nothing else."""
    for file in hub.folder.iterdir():
        file.unlink()
    wrap(base_model("qwen3_vl"), target_modules=["qkv"], r=3).save_pretrained(hub.folder)
    return hub


def test_a_repository(served, tmp_path, unplug):
    model = base_model("qwen3_vl")
    expected = merged_by_peft(model, served.folder)
    for options in ({}, {"local_files_only": True}):
        folder = locate_adapter(served.repo_id, cache_dir=tmp_path / "cache", **options)
        assert differing(merged_by_us(read_adapter(folder), "qwen3_vl", model), expected) == []
        unplug()


def test_force_download_gets_the_current_one(served, tmp_path):
    model = base_model("qwen3_vl")
    locate_adapter(served.repo_id, cache_dir=tmp_path / "cache")
    wrap(model, seed=1, target_modules=["qkv", "linear_fc1"], r=2).save_pretrained(served.folder)
    served.revisions["main"] = "b" * 40
    folder = locate_adapter(served.repo_id, cache_dir=tmp_path / "cache", force_download=True)
    expected = merged_by_peft(model, served.folder)
    assert differing(merged_by_us(read_adapter(folder), "qwen3_vl", model), expected) == []


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_FILE])
def test_a_repository_that_lacks_a_file(served, tmp_path, name):
    (served.folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"adapter: .*{name}"):
        locate_adapter(served.repo_id, cache_dir=tmp_path / "cache")


def test_no_such_repository(served, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter: org/other.*nor is there a local folder 'org/other'"):
        locate_adapter("org/other", cache_dir=tmp_path / "cache")


def test_paths_need_no_network(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_adapter(folder) == folder
    assert locate_adapter(str(folder)) == folder
    assert locate_adapter("~/adapter") == folder
    assert locate_adapter(folder / "..") == folder / ".."


@pytest.mark.parametrize(
    "name", ["", "nowhere", "a/b/c", "./a", "../a", "~/a", "a/b.safetensors", "/a/b", "a/b\n", "ä/b"]
)
def test_what_is_neither_a_path_nor_a_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="adapter: expected an existing folder or file, or a Hub repository"):
        locate_adapter(name)


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_a_repository_with_weights_trained_in_full(served, tmp_path, name):
    (served.folder / name).write_bytes(b"pickle")
    with pytest.raises(ValueError, match=f"{name} beside the adapter has weights that were trained in full"):
        locate_adapter(served.repo_id, cache_dir=tmp_path / "cache")
