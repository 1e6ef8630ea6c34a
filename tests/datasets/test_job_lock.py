"""The lock of a job's folder: two jobs never write to one, and one that died keeps nobody out."""

import errno
import os
import threading

import pytest

from support.jobs import exit_code, run_job, start_job


def test_two_jobs_are_kept_apart_and_a_dead_one_keeps_nobody_out(pictures, tmp_path):
    out = tmp_path / "out"
    entered, proceed = threading.Event(), threading.Event()

    def first_item(_):
        entered.set()
        proceed.wait(60)

    job = threading.Thread(target=run_job, args=(pictures, out), kwargs={"on_item": first_item})
    job.start()
    assert entered.wait(60)
    with pytest.raises(BlockingIOError, match=f"another job writes there .process {os.getpid()} on"):
        run_job(pictures, out)
    assert exit_code(start_job(pictures, out)) == 1  # nor from another process
    proceed.set()
    job.join()
    assert (out / ".lock").read_text().startswith("process ")
    assert run_job(pictures, out).complete


def test_a_folder_without_locks_is_told(pictures, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="the file system has no locks"):
        run_job(pictures, tmp_path / "out")
