"""Branches stay pinned to the commit of their last complete download until force_download moves them."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from qwenvit.weights.hub.fetch import fetch_config, fetch_tower
from qwenvit.weights.hub.repository import HEADER_GUESS_BYTES
from support.hub_server import Hub

A, B = "a" * 40, "b" * 40


@pytest.fixture
def config(hub, tmp_path):
    return lambda **options: fetch_config(hub.repo_id, **{"cache_dir": tmp_path / "cache", **options})


@pytest.fixture(params=["tower", "config"])
def either(request, fetch, config):
    return fetch if request.param == "tower" else config


def move(hub: Hub, branch: str = "main") -> None:
    hub.revisions |= {branch: B, "before": A}
    hub.requests.clear()


def test_a_branch_stays_pinned_when_another_tool_moves_the_shared_refs(hub, fetch, config, tmp_path):
    tower = fetch()
    move(hub)
    others = hf_hub_download(hub.repo_id, "config.json", cache_dir=tmp_path / "cache")
    assert B in others
    hub.requests.clear()
    assert tower.name == A
    for options in ({}, {"local_files_only": True}):
        assert fetch(**options) == config(**options) == tower
    assert not hub.requests


def test_forced_fetch_of_the_config_does_not_move_the_tower(hub, fetch, config):
    tower = fetch()
    move(hub)
    assert config(force_download=True).name == B
    hub.requests.clear()
    assert fetch() == fetch(local_files_only=True) == config() == tower
    assert not hub.requests


def test_a_forced_fetch_moves_the_branch_for_good(hub, fetch, config, unplug):
    old = fetch()
    move(hub)
    new = fetch(force_download=True)
    assert (old.name, new.name) == (A, B)
    hub.requests.clear()
    assert fetch(force_download=True) == new
    assert not hub.tensor_requests()
    unplug()
    assert fetch() == fetch(local_files_only=True) == config() == new
    assert fetch(revision=A) == old


def test_an_interrupted_update_leaves_the_old_tower_in_use(hub, fetch, size):
    old = fetch()
    move(hub)
    hub.budget = HEADER_GUESS_BYTES + size // 2
    with pytest.raises(ConnectionError, match="broke off"):
        fetch(force_download=True)
    hub.requests.clear()
    assert fetch() == fetch(local_files_only=True) == old
    assert not hub.requests
    hub.budget = None
    new = fetch(force_download=True)
    assert new.name == B
    assert fetch(local_files_only=True) == new


def test_a_fetch_does_not_move_a_branch_back_over_a_forced_update_meanwhile(hub, fetch, size):
    hub.budget, hub.stalls = HEADER_GUESS_BYTES + size // 2, True
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(fetch)
        hub.stalled.wait(300)
        hub.budget, hub.stalls = None, False
        move(hub)
        try:
            forced = fetch(force_download=True)
        finally:
            hub.go_on.set()
    assert (slow.result().name, forced.name) == (A, B)
    assert fetch(local_files_only=True) == forced


def test_an_interrupted_first_fetch_pins_nothing(hub, fetch):
    hub.budget = HEADER_GUESS_BYTES
    with pytest.raises(ConnectionError, match="broke off"):
        fetch()
    hub.budget = None
    move(hub)
    assert fetch().name == B


def test_a_damaged_tower_is_downloaded_again_at_its_own_commit(hub, fetch):
    tower = fetch()
    move(hub)
    (tower / "model.safetensors").write_bytes(b"")
    assert fetch() == tower
    assert (tower / "model.safetensors").stat().st_size


def test_branches_of_similar_names_are_separate(hub, fetch):
    pull = "refs%2Fpr%2F1"  # as in a request's path
    hub.revisions = {"main": A, "Main": B, pull: "c" * 40}
    names = {revision: fetch(revision=revision).name for revision in ("main", "Main", "refs/pr/1")}
    assert names == {"main": A, "Main": B, "refs/pr/1": "c" * 40}
    move(hub, pull)
    assert fetch(revision="refs/pr/1").name == "c" * 40
    assert fetch(revision="refs/pr/1", force_download=True).name == B
    assert fetch(revision="main").name == A


def test_an_empty_pin_file_counts_as_no_pin(hub, fetch, tmp_path):
    tower = fetch()
    (pin,) = (tower.parent / "refs").iterdir()
    assert pin.read_text() == f"{A} main\n"
    pin.write_text("")
    hub.requests.clear()
    assert fetch() == tower
    assert not hub.tensor_requests()
    assert pin.read_text() == f"{A} main\n"


def test_a_pin_is_replaced_in_one_step(hub, fetch, monkeypatch):
    tower = fetch()
    (pin,) = (tower.parent / "refs").iterdir()
    move(hub)
    write_bytes = Path.write_bytes

    def write_to_full_disk(file: Path, data: bytes) -> int:
        written = write_bytes(file, data[:7] if file.parent == pin.parent else data)
        if written < len(data):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return written

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_to_full_disk)
        with pytest.raises(OSError, match="No space left"):
            fetch(force_download=True)
    assert fetch(local_files_only=True) == tower
    with pin.open() as reader:  # of another process
        assert fetch(force_download=True).name == B
        assert reader.read() == f"{A} main\n"
    assert pin.read_text() == f"{B} main\n"


@pytest.mark.parametrize("revision", ["main", A])
def test_force_download_without_an_answer_is_an_error(fetch, either, unplug, revision):
    tower = fetch()
    unplug()
    with pytest.raises(ConnectionError, match=rf"org/model \({revision}\): no answer from http://127") as caught:
        either(force_download=True, revision=revision)
    assert "Force download failed" not in str(caught.value)
    assert fetch(local_files_only=True) == tower


def test_force_download_raises_the_errors_of_an_unforced_call(hub, either):
    with pytest.raises(FileNotFoundError, match=r"org/model \(v9\).*this revision does not"):
        either(force_download=True, revision="v9")
    hub.token = "hf_secret"
    with pytest.raises(FileNotFoundError, match=r"no such repository, or a private one.*token="):
        either(force_download=True)
    either(force_download=True, token="hf_secret")


def test_force_download_while_offline_is_refused(hub, either, monkeypatch):
    with pytest.raises(ValueError, match=r"force_download=True.*local_files_only=True.*HF_HUB_OFFLINE"):
        either(force_download=True, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"force_download=True.*HF_HUB_OFFLINE"):
        either(force_download=True)
    assert not hub.requests


def test_a_config_from_force_download_is_found_offline(hub, config):
    assert config(force_download=True).name == A
    move(hub)
    assert config(local_files_only=True).name == A
    assert config(force_download=True).name == B
    hub.requests.clear()
    assert config(local_files_only=True).name == B
    assert not hub.requests


def test_a_failed_lookup_leaves_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="network is off"):
        fetch_tower("org/typo", cache_dir=tmp_path / "cache", local_files_only=True)
    assert not (tmp_path / "cache").exists()


def test_a_config_on_this_machine_serves_where_the_hub_does_not_answer(hub, config, unplug):
    found = config()
    unplug()
    with pytest.warns(UserWarning, match=r"no answer from .* is used, which is on this machine"):
        assert config() == found
    with pytest.raises(ConnectionError, match="no answer from"):
        config(force_download=True)


@pytest.mark.parametrize("token", ["hf_\u00e9", "hf_a\nb"])
def test_a_token_that_no_header_can_have_is_refused_and_not_shown(hub, fetch, token):
    with pytest.raises(ValueError, match=r"^token: expected printable ASCII") as error:
        fetch(token=token)
    assert "hf_" not in str(error.value)


def test_a_token_read_from_a_file_may_end_in_a_new_line(hub, fetch):
    fetch(token="hf_secret\n")
    assert {request.authorization for request in hub.requests} == {"Bearer hf_secret"}
