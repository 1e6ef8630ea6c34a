"""A disk that is full, or that nothing can be written to: what is done stays, and the same call continues."""

import errno
import os
import subprocess
import time
from contextlib import suppress

import pytest

from qwenvit import item_stream
from qwenvit.datasets import device, job
from support.jobs import leftovers, make_pictures, rows_of, run_job

CONTINUES = "whole shards are kept, and the same call continues the job"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    pictures = make_pictures(folder / "pictures", 12)
    run_job(pictures, folder / "out", shard_images=3)
    return pictures, rows_of(folder / "out")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 160 kB in memory, less than the job writes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    with suppress(FileNotFoundError):
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            yield folder
            subprocess.run(["umount", "-l", str(folder)], check=True)
            return
    pytest.skip("mounting needs root")


def test_a_full_disk_stops_a_job_cleanly(whole, small_disk):
    pictures, expected = whole
    with pytest.raises(OSError, match=CONTINUES) as stopped:
        run_job(pictures, small_disk, shard_images=3)
    assert stopped.value.errno == errno.ENOSPC
    done = rows_of(small_disk)
    assert 0 < len(done) < len(expected)
    assert done.items() <= expected.items()
    assert leftovers(small_disk) == []
    with pytest.raises(OSError, match="No space left"):
        run_job(pictures, small_disk, shard_images=3)
    assert done.items() <= rows_of(small_disk).items()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert run_job(pictures, small_disk, shard_images=3).complete
    assert rows_of(small_disk) == expected


def test_a_disk_that_is_already_full_is_found_before_a_model_is_loaded(whole, small_disk, monkeypatch):
    pictures, expected = whole
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    monkeypatch.setattr(job, "load_encoder", None)
    with pytest.raises(OSError, match="No space left") as stopped:
        run_job(pictures, small_disk / "out")
    assert stopped.value.errno == errno.ENOSPC
    monkeypatch.undo()
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert run_job(pictures, small_disk / "out").complete
    assert rows_of(small_disk / "out") == expected


def test_a_disk_that_cannot_be_written_is_found_before_a_model_is_loaded(whole, small_disk, monkeypatch):
    pictures, expected = whole
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    run_job(pictures, small_disk / "done")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.setattr(job, "load_encoder", None)
    for output in ("new", "done"):
        with pytest.raises(OSError, match="Read-only file system") as stopped:
            run_job(pictures, small_disk / output)
        assert stopped.value.errno == errno.EROFS
    assert rows_of(small_disk / "done") == expected


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_found_before_a_model_is_loaded(whole, tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setattr(job, "load_encoder", None)
    with pytest.raises(PermissionError):
        run_job(whole[0], tmp_path / "out")


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("first", [1, 2, 3, 4, 5, 7, 9])
def test_each_operation_may_fail(whole, tmp_path, monkeypatch, operation, first):
    """The n-th call fails, and so do all after it, as on a disk that is full or gone."""
    pictures, expected = whole
    works, calls = getattr(os, operation), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) >= first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return works(*arguments)

    monkeypatch.setattr(os, operation, fails)
    with pytest.raises(OSError, match="No space left"):
        run_job(pictures, tmp_path, shard_images=3)
    monkeypatch.setattr(os, operation, works)
    assert rows_of_whole(tmp_path).items() <= expected.items()
    assert run_job(pictures, tmp_path, shard_images=3).complete
    assert rows_of(tmp_path) == expected
    assert leftovers(tmp_path) == []


def rows_of_whole(output):
    """Return the rows, where an index may be without its shard but no shard without its index."""
    assert all(path.with_suffix(".index.jsonl").exists() for path in output.glob("*.safetensors"))
    return rows_of(output)


@pytest.mark.parametrize("method", ["add_to_index", "finish"])
def test_an_error_while_writing_ends_the_job_soon(whole, tmp_path, monkeypatch, method):
    """The device must not go on for long when the writer has failed, or the thread that ends shards."""
    pictures, _ = whole
    encoded = []
    monkeypatch.setattr(
        device, "Encoded", lambda reports, seconds: encoded.append(reports) or _Encoded(reports, seconds)
    )
    from qwenvit.datasets import shard_stream

    monkeypatch.setattr(shard_stream.ShardFile, method, _full)
    monkeypatch.setattr(item_stream, "PATCHES_PER_BATCH", 1)
    put = shard_stream.ShardStream.put
    monkeypatch.setattr(shard_stream.ShardStream, "put", lambda *a: put(*a) or time.sleep(0.05))
    with pytest.raises(OSError, match="No space left"):
        run_job(pictures, tmp_path, shard_images=5)
    assert len(encoded) <= shard_stream.BATCHES_WAITING + 2 + (5 if method == "finish" else 0)
    assert leftovers(tmp_path) == []


_Encoded = device.Encoded


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
