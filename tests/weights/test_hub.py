import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvit.weights.hub import ranges
from qwenvit.weights.hub.fetch import fetch_config, fetch_tower
from qwenvit.weights.hub.repository import HEADER_GUESS_BYTES
from qwenvit.weights.local import find_tensors, load_tensors
from support.hub_process import path_from, start
from support.hub_server import Hub
from support.tiny_towers import Tower, build, save_sharded

SLACK = 64 << 10  # config files, and bytes in flight when a connection breaks
SINGLE = "model.safetensors"


def assert_complete(directory: Path, big: Tower) -> None:
    loaded = load_tensors(find_tensors(directory), big.expected, family=big.family)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in big.canonical.items())
    files = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    assert files == {SINGLE, "config.json", "preprocessor_config.json"}


def as_shards(hub: Hub, big: Tower) -> None:
    tensors = load_file(hub.folder / SINGLE)
    (hub.folder / SINGLE).unlink()
    shard_of = {name: 3 if name == "lm_head.weight" else i % 3 for i, name in enumerate(sorted(tensors))}
    save_sharded(hub.folder, tensors, shard_of)


def as_separate(hub: Hub, big: Tower) -> None:
    separate = {big.prefix + name: tensor for name, tensor in big.state.items()}
    save_file(separate, hub.folder / "model_visual.safetensors")
    save_file({"lm_head.weight": torch.ones(8 << 18)}, hub.folder / SINGLE)


@pytest.mark.parametrize("layout", [None, as_shards, as_separate])
def test_only_the_tower_is_downloaded(hub, fetch, big, size, layout):
    if layout is not None:
        layout(hub, big)
    directory = fetch()
    assert_complete(directory, big)
    assert (directory / "config.json").read_bytes() == (hub.folder / "config.json").read_bytes()
    whole = sum(file.stat().st_size for file in hub.folder.iterdir())
    assert size <= hub.served <= size + 3 * HEADER_GUESS_BYTES + SLACK < whole / 2


def test_the_downloaded_tower_loads_in_transformers(fetch, big):
    model, info = type(big.model).from_pretrained(fetch(), output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, big.state[name]) for name, tensor in model.state_dict().items())


def test_tensors_of_mixed_width_stay_aligned(hub, fetch):
    tower = build("qwen3_vl", hidden_size=14, intermediate_size=21, out_hidden_size=7, num_heads=1)
    odd = {name: t.half() if "bias" in name else t for name, t in tower.composite().items()}
    assert any(tensor.nbytes % 4 for tensor in odd.values())
    save_sharded(hub.folder, odd, {name: index % 2 for index, name in enumerate(odd)})
    (hub.folder / SINGLE).unlink()
    directory = fetch()
    assert all(entry.start % 4 == 0 for entry in find_tensors(directory).values() if entry.dtype == "F32")
    loaded = load_file(directory / SINGLE)
    assert all(torch.equal(loaded[name], odd[tower.prefix + name]) for name in tower.state)


def test_header_larger_than_the_first_request(hub, fetch, big, size):
    tensors = load_file(hub.folder / SINGLE)
    save_file(tensors, hub.folder / SINGLE, metadata={"note": "x" * (HEADER_GUESS_BYTES + 1000)})
    assert_complete(fetch(), big)
    assert hub.tensor_bytes() <= size + HEADER_GUESS_BYTES + SLACK


def test_dropped_connections_resume_in_the_middle(hub, fetch, big, size):
    hub.drops = 4
    assert_complete(fetch(), big)
    assert hub.drops == 0
    assert hub.tensor_bytes() <= size + HEADER_GUESS_BYTES + 4 * SLACK


def test_after_an_interruption_only_the_rest_is_downloaded(hub, fetch, big, size, tmp_path):
    hub.budget = HEADER_GUESS_BYTES + size // 2
    with pytest.raises(ConnectionError, match=r"org/model: the download broke off.*next call resumes it"):
        fetch()
    assert not list(tmp_path.rglob(f"assets/**/{SINGLE}"))
    first = hub.tensor_bytes()
    hub.budget = None
    assert_complete(fetch(), big)
    # Only the chunks in flight on the 8 connections are lost.
    assert hub.tensor_bytes() - first <= HEADER_GUESS_BYTES + size - size // 2 + 8 * ranges.CHUNK_BYTES
    assert hub.tensor_bytes() - first < HEADER_GUESS_BYTES + size - ranges.CHUNK_BYTES


def test_a_killed_process_leaves_no_file_under_the_final_name_and_the_next_resumes(hub, big, size, tmp_path):
    hub.budget, hub.stalls = HEADER_GUESS_BYTES + size * 3 // 4, True
    process = start(hub, tmp_path)
    assert hub.stalled.wait(300)
    journal = next(tmp_path.rglob("*.journal"))
    process.kill()
    process.communicate()
    assert not list(journal.parent.glob(SINGLE))
    kept = len(journal.read_text().splitlines()) - 1
    before = len(hub.tensor_requests())
    hub.budget, hub.stalls = None, False
    hub.go_on.set()
    assert_complete(path_from(start(hub, tmp_path)), big)
    fetched = [r for r in hub.tensor_requests() if r.range != f"bytes=0-{HEADER_GUESS_BYTES - 1}"]
    assert kept > 0
    assert sum(r.served for r in fetched) >= size
    # Count the second process alone: the server may still be sending into broken connections of the first.
    second = sum(request.served for request in hub.tensor_requests()[before:])
    assert second <= HEADER_GUESS_BYTES + size - (kept - 1) * ranges.CHUNK_BYTES


def test_a_changed_source_is_not_mixed_with_kept_chunks(hub, fetch, big, size, tmp_path):
    hub.budget = HEADER_GUESS_BYTES + size // 2
    with pytest.raises(ConnectionError):
        fetch()
    hub.budget = None
    tensors = {name: -tensor for name, tensor in load_file(hub.folder / SINGLE).items()}
    save_file(tensors, hub.folder / SINGLE, metadata={"shift": "offsets"})
    state = load_file(fetch() / SINGLE)
    assert all(torch.equal(state[name], -tensor) for name, tensor in big.state.items())


def test_second_start_sends_no_request(hub, big, tmp_path):
    first = path_from(start(hub, tmp_path))
    assert_complete(first, big)
    assert first.is_relative_to(tmp_path / "assets" / "qwenvit")
    sent = len(hub.requests)
    for script, environment in (("", {}), ("", {"HF_HUB_OFFLINE": "1"}), (", local_files_only=True", {})):
        assert path_from(start(hub, tmp_path, script, **environment)) == first
    assert len(hub.requests) == sent


def test_a_second_process_waits_for_the_first_and_downloads_nothing(hub, fetch, big, size, tmp_path):
    hub.budget, hub.stalls = HEADER_GUESS_BYTES + size // 2, True

    def second() -> list[str]:
        return [request.path for request in hub.requests if request.authorization == "Bearer second"]

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(fetch)
        hub.stalled.wait(300)
        process = start(hub, tmp_path, f", cache_dir={str(tmp_path / 'cache')!r}, token='second'")
        while not second() and process.poll() is None:  # until it looks up the branch, just before the lock
            time.sleep(0.01)
        time.sleep(0.5)  # long enough to ask for tensors, if nothing makes it wait
        hub.budget, hub.stalls = None, False
        hub.go_on.set()
    assert path_from(process) == first.result()
    assert second()
    assert not [path for path in second() if path.endswith(".safetensors")]
    assert_complete(first.result(), big)


def test_offline_without_the_tower_is_a_clear_error(hub, fetch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"org/model \(main\).*network is off"):
        fetch(local_files_only=True)
    _, err = start(hub, tmp_path, HF_HUB_OFFLINE="1").communicate(timeout=300)
    assert "the network is off" in err
    assert not hub.requests


def test_token_is_sent_from_argument_and_environment(hub, fetch, tmp_path):
    hub.token = "hf_secret"
    with pytest.raises(FileNotFoundError, match=r"org/model.*no such repository, or a private one.*token="):
        fetch()
    hub.requests.clear()
    fetch(token="hf_secret")
    assert {r.authorization for r in hub.requests if "/org/model/" in r.path} == {"Bearer hf_secret"}
    path_from(start(hub, tmp_path, HF_TOKEN="hf_secret"))


def test_token_does_not_follow_a_redirect_to_another_host(hub, fetch, big):
    hub.token = "hf_secret"
    with Hub(hub.folder) as storage:
        hub.storage = storage
        assert_complete(fetch(token="hf_secret"), big)
        assert storage.requests
        assert {request.authorization for request in storage.requests} == {None}


def test_revisions_are_separate_and_force_download_moves_a_branch(hub, fetch, big):
    hub.revisions = {"main": "a" * 40, "v2": "b" * 40}
    main, other = fetch(), fetch(revision="v2")
    assert (main.name, other.name) == ("a" * 40, "b" * 40)
    assert fetch(revision="b" * 40) == other
    hub.revisions["main"] = "c" * 40
    assert fetch(revision=None) == main
    assert fetch(force_download=True).name == "c" * 40
    assert fetch().name == "c" * 40
    with pytest.raises(FileNotFoundError, match=r"org/model \(v9\).*this revision does not"):
        fetch(revision="v9")


@pytest.mark.parametrize("file", [SINGLE, "config.json"])
def test_a_directory_without_a_needed_file_is_not_complete(hub, fetch, big, tmp_path, file):
    (fetch() / file).unlink()
    with pytest.raises(FileNotFoundError, match="network is off"):
        fetch(local_files_only=True)
    assert (fetch_config(hub.repo_id, cache_dir=tmp_path / "cache") / "config.json").is_file()
    assert_complete(fetch(), big)


@pytest.mark.parametrize("change", [-1000, -1, 1])
def test_a_damaged_file_is_downloaded_again(fetch, big, change):
    file = fetch() / SINGLE
    os.truncate(file, file.stat().st_size + change)
    assert_complete(fetch(), big)


def test_server_without_ranges_is_refused_before_its_body_is_read(hub, fetch, tmp_path):
    hub.ignores_ranges = True
    with pytest.raises(ValueError, match=r"status 200.*cannot send parts.*hf download"):
        fetch()
    assert not list(tmp_path.rglob("*.incomplete"))


def test_shard_with_trailing_bytes_is_refused_with_both_sizes(hub, fetch):
    promised = (hub.folder / SINGLE).stat().st_size
    os.truncate(hub.folder / SINGLE, promised + 1)
    with pytest.raises(ValueError, match=f"{SINGLE}: too long.*{promised}.*{promised + 1}"):
        fetch()


def test_truncated_shard_is_refused_with_both_sizes(hub, fetch):
    promised = (hub.folder / SINGLE).stat().st_size
    hub.truncated = {SINGLE: promised - 10}
    with pytest.raises(ValueError, match=f"{SINGLE}: truncated.*{promised}.*{promised - 10}"):
        fetch()


def test_gated_missing_and_unreachable_repositories(hub, fetch, tmp_path, monkeypatch):
    hub.gated = True
    with pytest.raises(PermissionError, match=r"org/model.*accept the licence at .*/org/model.*token="):
        fetch()
    with pytest.raises(FileNotFoundError, match=r"org/nothing \(main\): no such repository"):
        fetch_tower("org/nothing", cache_dir=tmp_path / "cache")
    hub.gated = False
    (hub.folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"org/model \(main\): the repository has no file .*config.json"):
        fetch()


def test_repository_without_safetensors(hub, fetch):
    shutil.move(hub.folder / SINGLE, hub.folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"org/model: only safetensors files are read.*convert it"):
        fetch()
    (hub.folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"org/model: expected one of .*got config.json"):
        fetch()


def test_repository_without_a_vision_tower(hub, fetch):
    save_file({"lm_head.weight": torch.ones(2)}, hub.folder / SINGLE)
    with pytest.raises(ValueError, match=r"org/model/model.safetensors: no vision tensors.*lm_head.weight"):
        fetch()


def test_no_answer_is_a_connection_error(hub, fetch, unplug):
    unplug()
    with pytest.raises(ConnectionError, match=r"org/model \(main\): no answer from http://127.0.0.1"):
        fetch()
