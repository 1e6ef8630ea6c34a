"""A job on several devices: a process each. Two on the CPU show all but the speed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import qwenvit
from qwenvit.datasets import job as job_module
from support.jobs import exit_code, leftovers, make_pictures, rows_of, run_job, start_job

TWO = {"devices": ["cpu", "cpu"], "shard_images": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    pictures = make_pictures(folder / "pictures", 100)
    (pictures / "broken.png").write_bytes(b"no picture")
    run_job(pictures, folder / "out", shard_images=8)
    return pictures, rows_of(folder / "out")


def children_of(process: int) -> list[int]:
    """Return the processes that a process has started and that are alive."""
    found = []
    for folder in os.listdir("/proc"):
        if folder.isdecimal():
            try:
                with open(f"/proc/{folder}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                with open(f"/proc/{folder}/cmdline") as file:
                    command = file.read()
            except OSError:
                continue
            if int(fields[1]) == process and fields[0] != "Z" and "spawn_main" in command:
                found.append(int(folder))
    return found


def is_alive(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_text())
    except OSError:
        return False


def wait_for_shard(output, job):
    deadline = time.monotonic() + 200
    while not list(output.glob("*.safetensors")) and job.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.is_alive()


def test_two_processes_write_the_rows_of_one(whole, tmp_path):
    pictures, expected = whole
    seen, progress = [], []
    settings = {"model": "demo", "min_pixels": 1024, "pool": "mean", "on_item": seen.append}
    with pytest.warns(UserWarning, match="random weights"):  # a worker's warnings are the caller's
        manifest = qwenvit.encode_dataset(pictures, tmp_path / "out", progress=progress.append, **TWO, **settings)
    assert rows_of(tmp_path / "out") == expected
    assert manifest.complete
    assert (manifest.counts["images"], manifest.counts["failed"]) == (100, 1)
    assert manifest.counts["shards"] == len(list((tmp_path / "out").glob("*.safetensors")))
    assert sorted(report.id for report in seen) == sorted([*expected, "broken.png"])
    assert (progress[-1].encoded, progress[-1].failed) == (100, 1)
    assert leftovers(tmp_path / "out") == []
    assert run_job(pictures, tmp_path / "out").counts == manifest.counts  # one device continues the work of two


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_with_their_shards(whole, tmp_path, signum):
    pictures, expected = whole
    job = start_job(pictures, tmp_path, **TWO)
    wait_for_shard(tmp_path, job)
    for process in (*children_of(job.pid), job.pid):  # a terminal sends it to all
        os.kill(process, signum)
    assert exit_code(job) == 128 + signum
    rows = rows_of(tmp_path)
    assert rows.items() <= expected.items()
    assert len(rows) == json.loads((tmp_path / "manifest.json").read_text())["counts"]["images"]
    assert leftovers(tmp_path) == []
    run_job(pictures, tmp_path, **TWO)
    assert rows_of(tmp_path) == expected


@pytest.mark.long
def test_workers_end_with_the_parent_and_lose_no_whole_shard(whole, tmp_path):
    pictures, expected = whole
    job = start_job(pictures, tmp_path, **TWO)
    wait_for_shard(tmp_path, job)
    workers = children_of(job.pid)
    assert len(workers) == 2
    os.kill(job.pid, signal.SIGKILL)
    assert exit_code(job) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "a worker has outlived the job"
        time.sleep(0.01)
    before = rows_of(tmp_path)
    assert before.items() <= expected.items()
    run_job(pictures, tmp_path)  # the lock is free
    assert rows_of(tmp_path) == expected
    assert leftovers(tmp_path) == []


def test_a_worker_that_dies_ends_the_job_with_an_error(whole, tmp_path):
    pictures, expected = whole
    killed = []

    def kill_one(_):
        if not killed and list(tmp_path.glob("*.safetensors")):
            killed.append(children_of(os.getpid())[0])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="the process of device cpu was killed by SIGKILL"):
        run_job(pictures, tmp_path, on_item=kill_one, **TWO)
    rows = rows_of(tmp_path)
    assert 0 < len(rows) < len(expected)
    assert len(rows) == json.loads((tmp_path / "manifest.json").read_text())["counts"]["images"]
    assert leftovers(tmp_path) == []
    assert children_of(os.getpid()) == []
    run_job(pictures, tmp_path)
    assert rows_of(tmp_path) == expected


@pytest.mark.long
def test_an_error_of_a_worker_is_the_jobs(whole, tmp_path):
    with pytest.raises(ValueError, match="device: 'warp' cannot be used"):
        run_job(whole[0], tmp_path, devices="cpu,warp")
    assert children_of(os.getpid()) == []
    with pytest.raises(ValueError, match="min_pixels"):
        run_job(whole[0], tmp_path, devices="cpu,cpu", min_pixels=10**9)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.long
def test_an_error_of_the_inputs_comes_after_the_shards(whole, tmp_path, monkeypatch):
    pictures, _ = whole
    find = job_module.find_records

    class Breaks:
        expected = None

        def __init__(self, *arguments, **options):
            self.records = find(*arguments, **options)

        def __iter__(self):
            for number, record in enumerate(self.records):
                if number == 70:
                    raise OSError("the network is gone")
                yield record

    monkeypatch.setattr(job_module, "find_records", Breaks)
    for devices in (["cpu", "cpu"], "cpu"):
        with pytest.raises(OSError, match="the network is gone"):
            run_job(pictures, tmp_path / str(len(devices)), devices=devices)
        assert len(rows_of(tmp_path / str(len(devices)))) == 70
