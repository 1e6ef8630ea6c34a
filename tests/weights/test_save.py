import errno
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwenvit.weights import save
from qwenvit.weights.header import read_header
from qwenvit.weights.local import find_tensors, load_tensors
from qwenvit.weights.save import save_tensors, write_safetensors
from support.tiny_towers import Tower

SINGLE = "model.safetensors"


def load(path: Path, tower: Tower) -> dict[str, torch.Tensor]:
    return load_tensors(find_tensors(path), tower.expected, family=tower.family)


def assert_same(loaded: dict[str, torch.Tensor], tower: Tower) -> None:
    assert list(loaded) == list(tower.canonical)
    for name, tensor in tower.canonical.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_saved_tower_reads_back_here_and_in_transformers(tmp_path, tower):
    # Two slices of one tensor, like q, k and v of a fused weight, and a transposed tensor.
    fused = torch.stack([tower.canonical["blocks.0.norm1.weight"], tower.canonical["blocks.1.norm1.weight"]])
    tensors = tower.canonical | {"blocks.0.norm1.weight": fused[0], "blocks.1.norm1.weight": fused[1]}
    tensors["merger.fc1.weight"] = tensors["merger.fc1.weight"].t().contiguous().t()
    save_tensors(tmp_path / SINGLE, tensors, tower.family, {"made_by": "test"})
    assert_same(load(tmp_path, tower), tower)
    official = load_file(tmp_path / SINGLE)
    assert all(torch.equal(official[name], tensor) for name, tensor in tower.state.items())
    assert len(official) == len(tower.state)
    text = (tmp_path / SINGLE).read_bytes()[8:300]
    assert b'"format":"pt"' in text
    assert b'"made_by":"test"' in text
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]


def test_a_save_replaces_the_file_that_others_have_open(tmp_path, qwen3):
    file = tmp_path / SINGLE
    save_tensors(file, qwen3.canonical, "qwen3_vl")
    before = file.read_bytes()
    with file.open("rb") as reader:
        save_tensors(file, {name: -tensor for name, tensor in qwen3.canonical.items()}, "qwen3_vl")
        assert reader.read() == before
    assert_same({name: -tensor for name, tensor in load(tmp_path, qwen3).items()}, qwen3)
    assert [other.name for other in tmp_path.iterdir()] == [SINGLE]


def test_failed_save_leaves_the_old_file(tmp_path, qwen3):
    save_tensors(tmp_path / SINGLE, qwen3.canonical, "qwen3_vl")
    before = (tmp_path / SINGLE).read_bytes()
    with pytest.raises(ValueError, match="qwen2_vl"):
        save_tensors(tmp_path / SINGLE, qwen3.canonical, "qwen2_vl")
    assert (tmp_path / SINGLE).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]


DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.dictionaries(st.text().filter(lambda name: name != "__metadata__"), st.tuples(DTYPES, SHAPES), max_size=5),
    metadata=st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_safetensors_reads_what_is_written(tmp_path_factory, drawn, metadata):
    file = tmp_path_factory.getbasetemp() / "drawn.safetensors"
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in drawn.items()}
    write_safetensors(file, tensors, metadata)
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name], tensor)
    with safe_open(file, "pt") as opened:
        assert (opened.metadata() or {}) == metadata


def test_tensors_are_aligned_and_take_what_safetensors_takes(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(5), "c": torch.ones((), dtype=torch.float64)}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    for name, entry in read_header(tmp_path / "ours").items():
        assert entry.start % tensors[name].itemsize == 0


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": torch.ones(1, dtype=torch.int8)}, {}, "tensors: a: expected BF16, F16, F32, F64, got torch.int8"),
        ({"a": torch.ones(1)}, {"b": 1}, "__metadata__: 'b': expected a string, got 1"),
        ({"\udcff": torch.ones(1)}, {}, "half of a surrogate pair"),
        ({"a": torch.ones(1)}, {"b": "\ud800"}, "half of a surrogate pair"),
        ({"__metadata__": torch.ones(1)}, {}, "__metadata__: 'shape': expected a string"),
    ],
)
def test_what_no_reader_takes_is_not_written(tmp_path, tensors, metadata, message):
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / SINGLE, tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def write(file: Path, value: float, count: int = 1000) -> None:
    write_safetensors(file, {"a": torch.full((count,), float(value)), "b": torch.full((count,), float(value))}, {})


def written(file: Path) -> float:
    tensors = load_file(file)
    (value,) = {float(number) for tensor in tensors.values() for number in tensor}
    return value


def test_threads_that_write_one_file_leave_one_whole(tmp_path):
    file = tmp_path / SINGLE
    with ThreadPoolExecutor(16) as threads:
        for _ in threads.map(write, [file] * 200, range(200)):
            assert written(file) in range(200)
    assert [other.name for other in tmp_path.iterdir()] == [SINGLE]


class Stop(BaseException):
    """Like KeyboardInterrupt."""


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
@pytest.mark.parametrize("failure", [FULL, Stop()])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, step, failure):
    file = tmp_path / SINGLE
    write(file, 1)
    before = file.read_bytes()

    def fail(*_: object) -> None:
        # The temporary file is there, so that its absence afterwards says something.
        assert len(list(tmp_path.iterdir())) == 2
        raise failure

    if step == "write":
        monkeypatch.setattr(torch.Tensor, "numpy", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)) as raised:
        write(file, 2)
    if failure is FULL:
        assert raised.value.errno == errno.ENOSPC
        assert str(file) in str(raised.value)
    assert file.read_bytes() == before
    assert [other.name for other in tmp_path.iterdir()] == [SINGLE]


def test_the_bytes_and_the_name_are_brought_to_the_disk_in_this_order(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    kind = {True: "folder", False: "file"}

    def record_fsync(descriptor: int) -> None:
        calls.append(kind[stat.S_ISDIR(os.fstat(descriptor).st_mode)])
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        assert written(source) == 3
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(tmp_path / SINGLE, 3)
    assert calls == (["file", "rename", "folder"] if os.name == "posix" else ["file", "rename"])


IN_A_PROCESS = """
import os, resource, signal, sys
from pathlib import Path
import torch
from qwenvit.weights.save import write_safetensors
if limit := int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    write_safetensors(sys.argv[1], {"a": torch.ones(1_000_000)}, {})
except OSError as error:
    print(error.errno, error.filename)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of processes")
def test_a_limit_of_the_file_size_leaves_what_was_there(tmp_path):
    file = tmp_path / SINGLE
    write(file, 1)
    command = [sys.executable, "-c", IN_A_PROCESS, str(file), "2000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(save.__file__).parents[1])
    assert done.stdout.strip() == f"{errno.EFBIG} {file}"
    assert written(file) == 1
    assert [other.name for other in tmp_path.iterdir()] == [SINGLE]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """A disk of 2 MB, in a mount namespace of its own."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    inside = f'mount -t tmpfs -o size=2m full "{tmp_path}" && '
    if not shutil.which("unshare") or subprocess.run([*mount, inside + "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    file = tmp_path / SINGLE
    run = f'echo before > "{file}" && "{sys.executable}" -c "$0" "{file}" 0 && cat "{file}" && ls -A "{tmp_path}"'
    command = [*mount, inside + run, IN_A_PROCESS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(save.__file__).parents[1])
    assert done.stdout.splitlines() == [f"{errno.ENOSPC} {file}", "before", SINGLE]


@pytest.mark.skipif(os.name != "posix", reason="permissions")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / SINGLE, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / SINGLE).stat().st_mode) == 0o666 & ~umask


def test_the_longest_name_of_a_file_system_can_be_written(tmp_path):
    file = tmp_path / ("x" * 243 + ".safetensors")
    write(file, 1)
    assert written(file) == 1
