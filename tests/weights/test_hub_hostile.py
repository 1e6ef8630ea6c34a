"""A Hub that lies: nothing outside the cache, nothing wrong in it, nothing without bounds."""

import errno
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvit.weights.hub.fetch import fetch_adapter, fetch_config
from support.hub_server import Hub, Reply

A = "a" * 40
OUTSIDE = ("../../../../x", "../" + "a" * 37, "/etc/x", "..", "", "A" * 40, "a" * 39, None, 3, ["a" * 40], "main")
NAMES = ("../config.json", "/etc/passwd", "a/../../b", "..", "a\\..\\b", "\\x", "a//b", "", "a\0b", None, 3, {})


@pytest.fixture
def everything(tmp_path):
    """A function that returns each file below the test's folder except the cache, with its content."""

    def everything() -> dict[Path, bytes]:
        files = [file for file in tmp_path.rglob("*") if file.is_file() and tmp_path / "cache" not in file.parents]
        return {file: file.read_bytes() for file in files}

    return everything


@pytest.fixture
def config(hub, tmp_path):
    return lambda **options: fetch_config(hub.repo_id, **{"cache_dir": tmp_path / "cache", **options})


def change_listing(hub: Hub, change) -> None:
    def lie(method: str, path: str, reply: Reply) -> None:
        if "/api/" in path:
            listing = json.loads(reply.body)
            change(listing)
            reply.body = json.dumps(listing).encode()
            reply.fields["Content-Length"] = str(len(reply.body))

    hub.lie = lie


def names_below(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("sha", OUTSIDE)
def test_only_a_commit_names_a_folder(hub, fetch, config, tmp_path, everything, sha, forced):
    change_listing(hub, lambda listing: listing.update(sha=sha))
    before = everything()
    for what in (fetch, config):
        with pytest.raises(ValueError, match=r"sha: expected a commit of 40 hex digits, got "):
            what(force_download=forced)
    assert everything() == before
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_listing_with_names_that_lead_elsewhere_is_refused(hub, fetch, tmp_path, everything, name):
    change_listing(hub, lambda listing: listing["siblings"].append({"rfilename": name}))
    before = everything()
    with pytest.raises(ValueError, match="rfilename: expected a path within the repository, got "):
        fetch()
    assert everything() == before
    assert not (tmp_path / "cache").exists()


def test_odd_names_of_other_files_are_no_reason_to_refuse(hub, fetch, big):
    odd = ("Screenshot 10:30.png", "a\\b", "\u4e2d\u6587.txt", "...", "a\nb", "x" * 300)
    change_listing(hub, lambda listing: listing["siblings"].extend({"rfilename": name} for name in odd))
    assert load_file(fetch() / "model.safetensors").keys() == big.state.keys()


@pytest.mark.parametrize(
    "listing", [b"[]", b"3", b"", b"\xff", b"{", b'{"sha":"' + b"a" * 40 + b'"}', b'{"a":1,"a":2}', b"[" * 100_000]
)
def test_a_listing_that_is_none_is_refused(hub, fetch, listing):
    def lie(method: str, path: str, reply: Reply) -> None:
        reply.body, reply.fields["Content-Length"] = listing, str(len(listing))

    hub.lie = lie
    with pytest.raises(ValueError, match=r"/api/models/org/model/revision/main"):
        fetch()


def test_another_commit_than_the_one_asked_for_is_refused(hub, fetch):
    change_listing(hub, lambda listing: listing.update(sha="b" * 40))
    with pytest.raises(ValueError, match=f"expected commit {A}, got {'b' * 40}"):
        fetch(revision=A)


@pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag", "X-Linked-Etag", "Location"])
def test_headers_name_no_files(hub, fetch, everything, header, big):
    def lie(method: str, path: str, reply: Reply) -> None:
        if "/resolve/" in path:
            reply.fields[header] = "../../../../../x"

    hub.lie = lie
    before = everything()
    if header == "X-Repo-Commit":
        with pytest.raises(ValueError, match="expected a file of commit"):
            fetch()
    else:
        state = load_file(fetch() / "model.safetensors")
        assert all(torch.equal(state[name], tensor) for name, tensor in big.state.items())
    assert everything() == before


def huge_header(hub: Hub, nbytes: int) -> None:
    """Let the first tensor's shape and the file's size claim so many bytes more."""
    data = (hub.folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"][1] if "visual" in name else -1)
    begin = header[last]["data_offsets"][0]
    header = {name: entry for name, entry in header.items() if entry["data_offsets"][0] <= begin}
    header[last] = {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [begin, begin + nbytes]}
    text = json.dumps(header if metadata is None else {"__metadata__": metadata} | header).encode()
    whole = 8 + len(text) + begin + nbytes
    served = struct.pack("<Q", len(text)) + text + data[8 + length :]
    (hub.folder / "model.safetensors").write_bytes(served)
    hub.lists_hashes = False

    def lie(method: str, path: str, reply: Reply) -> None:
        if reply.status == 206:
            reply.fields["Content-Range"] = reply.fields["Content-Range"].rpartition("/")[0] + f"/{whole}"

    hub.lie = lie


@pytest.mark.parametrize("nbytes", [1 << 40, 1 << 60])
def test_a_header_of_2_to_the_60_bytes_is_refused_at_once(hub, fetch, nbytes):
    huge_header(hub, nbytes)
    with pytest.raises(ValueError, match=r"expected at most 68,719,476,736 bytes to download, got [\d,]+ by"):
        fetch()


def test_a_tower_that_does_not_fit_on_the_disk_is_refused_before_it_is_downloaded(hub, fetch, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match=r"needs 3,[\d,]+ bytes more, but its disk has only 1,000,000 free") as error:
        fetch()
    assert error.value.errno == errno.ENOSPC
    assert len(hub.tensor_requests()) == 1  # the header
    assert "model.safetensors" not in names_below(tmp_path / "cache")


def test_a_file_with_another_hash_than_the_hub_says_is_refused(hub, fetch, big, tmp_path):
    """The vision file is downloaded whole, and one of its bytes differs from what the listing has a hash of."""
    separate = {big.prefix + name: tensor for name, tensor in big.state.items()}
    save_file(separate, hub.folder / "model_visual.safetensors")
    whole = hub.folder / "model_visual.safetensors"
    sha256 = hashlib.sha256(whole.read_bytes()).hexdigest()
    data = bytearray(whole.read_bytes())
    data[-5] ^= 1
    whole.write_bytes(data)

    def change(listing: dict) -> None:
        entry = next(e for e in listing["siblings"] if e["rfilename"] == whole.name)
        entry["lfs"]["sha256"] = sha256

    change_listing(hub, change)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"model_visual.safetensors: expected SHA-256 {sha256} as the Hub says"):
            fetch()
        assert not names_below(tmp_path / "cache") & {"model.safetensors", "model.safetensors.incomplete"}
    data[-5] ^= 1
    whole.write_bytes(data)
    assert load_file(fetch() / "model.safetensors").keys() == big.state.keys()


def test_the_hash_in_the_answers_counts_where_the_listing_has_none(hub, fetch, big):
    (hub.folder / "model.safetensors").unlink()
    save_file({big.prefix + name: tensor for name, tensor in big.state.items()}, hub.folder / "model.safetensors")

    def lie(method: str, path: str, reply: Reply) -> None:
        if "/api/" in path:
            reply.body = json.dumps(json.loads(reply.body) | {"siblings": names}).encode()
            reply.fields["Content-Length"] = str(len(reply.body))
        elif path.endswith(".safetensors"):
            reply.fields["X-Linked-Etag"] = '"' + "f" * 64 + '"'

    names = [{"rfilename": file.name} for file in hub.folder.iterdir()]
    hub.lie = lie
    with pytest.raises(ValueError, match=f"expected SHA-256 {'f' * 64} as the Hub says"):
        fetch()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "adapter_config.json"])
def test_a_small_file_with_another_hash_is_refused(hub, fetch, tmp_path, name):
    if name.startswith("adapter"):
        (hub.folder / name).write_text('{"peft_type": "LORA"}')

    def lie(method: str, path: str, reply: Reply) -> None:
        if path.endswith("/" + name):
            reply.body = reply.body.replace(b"{", b" ", 1)

    hub.lie = lie
    with pytest.raises(ValueError, match=rf"{name}: expected git's hash [0-9a-f]{{40}}, got "):
        fetch()
    assert name not in names_below(tmp_path / "cache")


def test_an_adapter_with_another_hash_is_refused(hub, tmp_path):
    (hub.folder / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(100)}, hub.folder / "adapter_model.safetensors")

    def lie(method: str, path: str, reply: Reply) -> None:
        if path.endswith("adapter_model.safetensors"):
            reply.body = reply.body[:-1] + b"x"

    hub.lie = lie
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: expected SHA-256"):
        fetch_adapter(hub.repo_id, cache_dir=tmp_path / "cache")
    assert not [name for name in names_below(tmp_path / "cache") if name.startswith("adapter_model")]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_than_the_listing_says_is_refused(hub, fetch, change):
    def change_size(listing: dict) -> None:
        for entry in listing["siblings"]:
            if entry["rfilename"] == "model.safetensors":
                entry["size"] += change

    change_listing(hub, change_size)
    with pytest.raises(ValueError, match=r"model.safetensors: expected \d+ bytes by the repository's listing, got"):
        fetch()


def test_a_file_that_changes_between_two_calls_is_downloaded_from_its_beginning(hub, fetch, big, size):
    """The same header, size and offsets, but other tensors: only the ETag tells."""
    hub.budget = (256 << 10) + size // 2
    with pytest.raises(ConnectionError, match="broke off"):
        fetch()
    hub.budget = None
    tensors = {name: -tensor for name, tensor in load_file(hub.folder / "model.safetensors").items()}
    save_file(tensors, hub.folder / "model.safetensors")
    state = load_file(fetch() / "model.safetensors")
    assert all(torch.equal(state[name], -tensor) for name, tensor in big.state.items())


def test_a_file_that_changes_during_the_download_is_refused_and_the_next_call_is_whole(hub, fetch, big):
    path = hub.folder / "model.safetensors"
    tensors = {name: -tensor for name, tensor in load_file(path).items()}
    parts = 0

    def lie(method: str, url: str, reply: Reply) -> None:
        nonlocal parts
        parts += reply.status == 206
        if parts == 5:
            save_file(tensors, path.with_name("new"))
            os.replace(path.with_name("new"), path)

    hub.lie = lie
    with pytest.raises(ValueError, match="the file changed on the server during the download"):
        fetch()
    state = load_file(fetch() / "model.safetensors")
    assert all(torch.equal(state[name], -tensor) for name, tensor in big.state.items())


def test_bytes_that_the_disk_lost_are_downloaded_again(hub, fetch, big, size, tmp_path):
    hub.budget = (256 << 10) + size // 2
    with pytest.raises(ConnectionError, match="broke off"):
        fetch()
    hub.budget = None
    (incomplete,) = tmp_path.rglob("*.incomplete")
    incomplete.write_bytes(bytes(incomplete.stat().st_size))
    state = load_file(fetch() / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in big.state.items())


def test_a_poisoned_config_is_fetched_anew_by_force(hub, fetch, config):
    served = (hub.folder / "config.json").read_bytes()
    tower = fetch()
    for what in (fetch, config):
        (tower / "config.json").write_text("poison")
        assert what() == tower
        assert (what(force_download=True) / "config.json").read_bytes() == served
    assert len({request.path for request in hub.tensor_requests()}) == 1


def test_a_config_without_bounds_is_refused(hub, config, fetch):
    def lie(method: str, path: str, reply: Reply) -> None:
        if path.endswith("config.json"):
            reply.endless, reply.fields["Connection"] = True, "close"
            del reply.fields["Content-Length"]

    hub.lie = lie
    for what in (config, fetch):
        with pytest.raises(ValueError, match=r"config.json: expected at most 67108864 bytes, got more"):
            what()
    hub.go_on.set()
