"""Models that huggingface_hub itself put into its cache are used before anything is downloaded."""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from safetensors.torch import load_file

from qwenvit.weights.hub.cache import HubCache, clean_subfolder, snapshot_in
from qwenvit.weights.hub.fetch import fetch_config, fetch_tower
from qwenvit.weights.local import find_tensors, load_tensors
from support.hub_process import path_from, start
from support.tiny_towers import save_sharded

A, B = "a" * 40, "b" * 40
CONFIGS = ("config.json", "preprocessor_config.json")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(hub):
    """The checkpoint in shards 1 to 3, of which the last has no vision tensors; names of all files."""
    tensors = load_file(hub.folder / "model.safetensors")
    (hub.folder / "model.safetensors").unlink()
    shard_of = {name: 2 if name == "lm_head.weight" else i % 2 for i, name in enumerate(sorted(tensors))}
    save_sharded(hub.folder, tensors, shard_of)
    return sorted(file.name for file in hub.folder.iterdir())


@pytest.fixture
def cached(hub, tmp_path):
    """A function that lets huggingface_hub download files to its cache; returns the snapshot."""

    def cached(names, revision="main", folder=tmp_path / "cache"):
        files = [Path(hf_hub_download(hub.repo_id, name, revision=revision, cache_dir=folder)) for name in names]
        hub.requests.clear()
        return files[0].parent

    return cached


@pytest.fixture
def config(hub, tmp_path):
    return lambda **options: fetch_config(hub.repo_id, **{"cache_dir": tmp_path / "cache", **options})


@pytest.mark.parametrize("revision", ["main", None, A])
@pytest.mark.parametrize("offline", [False, True])
def test_a_complete_snapshot_is_used_as_it_is(hub, sharded, cached, fetch, config, big, revision, offline):
    snapshot = cached(name for name in sharded if "00003-of" not in name)  # the last shard is the language model's
    found = fetch(revision=revision, local_files_only=offline)
    assert found == config(revision=revision, local_files_only=offline) == snapshot
    assert not hub.requests
    loaded = load_tensors(find_tensors(found), big.expected, family=big.family)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in big.canonical.items())


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_cache_is_where_huggingface_hub_says(hub, sharded, cached, tmp_path, variable):
    snapshot = cached(sharded, folder=tmp_path / "elsewhere" / "hub")
    place = {"HF_HOME": tmp_path / "elsewhere", "HF_HUB_CACHE": tmp_path / "elsewhere" / "hub"}[variable]
    for offline in ("0", "1"):
        process = start(hub, tmp_path / "home", **{variable: str(place), "HF_HUB_OFFLINE": offline})
        assert path_from(process) == snapshot
    assert not hub.requests


@pytest.mark.parametrize("absent", ["config.json", INDEX, "model-00001-of-00003.safetensors"])
def test_a_partial_snapshot_is_named_offline_and_downloaded_online(hub, sharded, cached, fetch, absent):
    snapshot = cached(name for name in sharded if name != absent)
    with pytest.raises(FileNotFoundError) as error:
        fetch(local_files_only=True)
    for told in (f"org/model (main), at commit {A}", "the network is off", f"{snapshot}: ", absent):
        assert told in str(error.value)
    tower = fetch()
    assert tower != snapshot
    assert load_file(tower / "model.safetensors")
    hub.requests.clear()
    assert fetch() == fetch(local_files_only=True) == tower
    assert not hub.requests


def test_a_truncated_blob_does_not_count(sharded, cached, fetch):
    snapshot = cached(sharded)
    blob = (snapshot / "model-00002-of-00003.safetensors").resolve()
    os.truncate(blob, blob.stat().st_size - 1)
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.safetensors: truncated"):
        fetch(local_files_only=True)
    assert fetch() != snapshot


def test_a_commit_that_no_branch_names_is_told(hub, sharded, cached, fetch):
    snapshot = cached(sharded, revision=A)
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(snapshot))}: complete: pass revision='{A}'"):
        fetch(local_files_only=True)
    assert fetch(revision=A, local_files_only=True) == snapshot
    # The Hub says that main is at this commit, and the tower need not be downloaded.
    assert fetch() == snapshot
    assert not [request for request in hub.requests if "/resolve/" in request.path]
    # It was not downloaded here, and so it pins nothing.
    hub.revisions = {"main": B, "before": A}
    assert fetch().name == B


def test_a_branch_moves_with_huggingface_hubs_cache_unless_it_was_downloaded_here(hub, sharded, cached, fetch):
    old = cached(sharded)
    hub.revisions = {"main": B, "before": A}
    assert fetch() == fetch(local_files_only=True) == old
    new = cached(sharded)
    assert new.name == B
    assert fetch() == fetch(local_files_only=True) == new
    for name in sharded:
        (new / name).unlink()
    tower = fetch()  # downloaded here: pinned
    assert tower.name == B
    hub.revisions |= {"main": A}
    assert cached(sharded).name == A
    assert fetch() == fetch(local_files_only=True) == tower
    assert not hub.requests


def test_force_download_uses_a_complete_snapshot_of_the_current_commit(hub, sharded, cached, fetch):
    snapshot = cached(sharded)
    assert fetch(force_download=True) == snapshot
    assert not hub.tensor_requests()
    hub.revisions = {"main": B, "before": A}
    new = fetch(force_download=True)
    assert new.name == B
    assert hub.tensor_requests()
    assert fetch(local_files_only=True) == new


def test_force_download_passes_over_a_snapshot_whose_config_differs_from_the_hubs(hub, sharded, cached, fetch, config):
    snapshot = cached(sharded)
    blob = (snapshot / "config.json").resolve()
    blob.write_text(blob.read_text().replace('"depth": 2', '"depth": 3'))
    assert fetch() == snapshot
    served = (hub.folder / "config.json").read_bytes()
    assert (config(force_download=True) / "config.json").read_bytes() == served
    tower = fetch(force_download=True)
    assert tower != snapshot
    assert (tower / "config.json").read_bytes() == served
    assert fetch() == tower


def test_a_snapshot_without_processor_configs_is_told(sharded, cached, fetch):
    cached(name for name in sharded if name != "preprocessor_config.json")
    with pytest.warns(UserWarning, match=r"has none of preprocessor_config.json.*hf download org/model"):
        fetch()
    cached(["preprocessor_config.json"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch()


def test_our_copies_are_no_repositories_of_huggingface_hubs_cache(hub, fetch, tmp_path, monkeypatch):
    """What the README says of `hf cache ls`: it lists huggingface_hub's cache, and our copies are beside that."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "home" / "assets"))
    (tmp_path / "home" / "hub").mkdir(parents=True)
    tower = fetch(cache_dir=None)
    assert tower == tmp_path / "home" / "assets" / "qwenvit" / "org--model" / A
    listed = scan_cache_dir(tmp_path / "home" / "hub")
    assert not listed.repos
    assert not listed.warnings


def test_a_models_folder_given_as_a_path_is_the_snapshot_of_main(sharded, cached, tmp_path):
    snapshot = cached(sharded)
    models = tmp_path / "cache" / "models--org--model"
    assert snapshot_in(models) == snapshot
    assert snapshot_in(snapshot) == snapshot
    (models / "snapshots" / B).mkdir()
    assert snapshot_in(models) == snapshot
    (models / "refs" / "main").unlink()
    with pytest.raises(ValueError, match=rf"expected the branch main or one snapshot, got 2 \(.*{A}.*{B}"):
        snapshot_in(models)
    (models / "snapshots" / B).rmdir()
    assert snapshot_in(models) == snapshot


@pytest.mark.parametrize("subfolder", ["..", "../x", "/etc", "a/../../b", "a//b", "./a", "a\\b", "c:", "a\0", "/"])
def test_a_subfolder_that_leads_elsewhere_is_refused(subfolder, tmp_path):
    with pytest.raises(ValueError, match="subfolder: expected a folder within the repository"):
        fetch_tower("org/model", subfolder=subfolder, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_folders():
    assert clean_subfolder(None) == clean_subfolder("") == ""
    assert clean_subfolder("a/b/") == clean_subfolder("a/b") == "a/b"
    with pytest.raises(TypeError, match="subfolder: expected a string, got int"):
        clean_subfolder(3)
    for commit in ("", "main", "../" + "a" * 37, "A" * 40, "a" * 39, "a" * 41, "a" * 40 + "\n"):
        with pytest.raises(ValueError, match="commit: expected 40 hex digits"):
            HubCache("org/model", None).directory(commit, "")
    for repo_id in ("../x", "org/..", "a/b/c", "/etc", "org/mo del"):
        with pytest.raises(ValueError, match="repo"):
            HubCache(repo_id, None)
