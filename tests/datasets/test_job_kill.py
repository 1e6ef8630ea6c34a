"""A job that is killed loses at most two shards, and the same call continues it to the same rows."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress

import pytest

from support.jobs import exit_code, leftovers, make_pictures, rows_of, run_job, start_job

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module", params=[pytest.param(24), pytest.param(400, marks=pytest.mark.long)])
def undisturbed(request, tmp_path_factory):
    """Pictures, the rows of a job that nobody disturbs, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pictures = make_pictures(folder / "pictures", request.param)
    exit_code(start_job(pictures, folder / "first", shard_images=8))  # starts the server of processes
    start = time.perf_counter()
    assert exit_code(start_job(pictures, folder / "out", shard_images=8)) == 0
    seconds = time.perf_counter() - start
    rows = rows_of(folder / "out")
    assert rows.keys() == {path.name for path in pictures.iterdir()}
    return pictures, rows, seconds


def continue_until_done(pictures, output, generator, seconds):
    """Run a job again and again, killed at a random moment each time; return how often that hit it."""
    kills, before = 0, {}
    while True:
        job = start_job(pictures, output, shard_images=8)
        signum = generator.choice(SIGNALS)
        if kills < 4:
            job.join(generator.uniform(0, 0.8 * seconds))
            if job.is_alive():
                before = rows_of(output)
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(job.pid, signum)
        code = exit_code(job)
        if code == 0:
            return kills
        # A signal may come before the job has its handlers: then Python's or the system's way to die is right.
        assert code in (-signum, 128 + signum, 1 if signum == signal.SIGINT else -signum)
        after = rows_of(output)
        assert before.items() <= after.items(), "rows were lost"
        kills += 1


def test_a_killed_job_ends_with_the_rows_of_an_undisturbed_one(undisturbed, tmp_path):
    pictures, expected, seconds = undisturbed
    kills = 0
    for seed in range(4 if len(expected) < 100 else 100):
        generator = random.Random(seed)
        output = tmp_path / str(seed)
        kills += continue_until_done(pictures, output, generator, seconds)
        assert rows_of(output) == expected
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["complete"]
        assert manifest["counts"]["images"] == len(expected)
        assert manifest["counts"]["failed"] == 0
        assert leftovers(output) == []
        shutil.rmtree(output)
    assert kills >= seed // 3, "the moments were chosen so badly that few jobs were hit"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    pictures = make_pictures(folder / "pictures", 5)
    (pictures / "broken.png").write_bytes(b"no picture")
    run_job(pictures, folder / "out", shard_images=2)
    return pictures, rows_of(folder / "out")


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_a_job_may_die_before_any_operation_on_its_files(few, tmp_path, first):
    """Kill it before its n-th operation, for each n, each time continuing what the one before has left."""
    pictures, expected = few
    output, deaths, code = tmp_path / "out", 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        code = exit_code(start_job(pictures, output, dies_at=first + 4 * deaths, shard_images=2))
        deaths += 1
        if (output / "manifest.json").exists():
            json.loads((output / "manifest.json").read_text())
        assert rows_of(output).items() <= expected.items()
    assert code == 0
    assert deaths > 3
    assert rows_of(output) == expected
    assert leftovers(output) == []
    assert [json.loads(line)["id"] for line in (output / "errors.jsonl").open()] == ["broken.png"]


@pytest.mark.long
def test_a_job_may_die_before_each_operation_on_its_files(few, tmp_path):
    pictures, expected = few
    n, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        n += 1
        output = tmp_path / str(n)
        code = exit_code(start_job(pictures, output, dies_at=n, shard_images=2))
        before = rows_of(output)
        assert before.items() <= expected.items()
        run_job(pictures, output, shard_images=2)
        assert rows_of(output) == expected
        assert leftovers(output) == []
    assert n > 20


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_job_after_its_batch_with_a_shard(undisturbed, tmp_path, signum):
    pictures, expected, _ = undisturbed
    job = start_job(pictures, tmp_path, signals_at=(5, signum), shard_images=1000)
    assert exit_code(job) == 128 + signum
    rows = rows_of(tmp_path)
    assert rows == {name: expected[name] for name in sorted(expected)[:5]}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["complete"], manifest["counts"]["images"]) == (False, 5)
    assert leftovers(tmp_path) == []


def test_a_second_interrupt_ends_a_job_at_once(undisturbed, tmp_path):
    """The shard that is being written is lost, and nothing else."""
    pictures, expected, _ = undisturbed
    job = start_job(pictures, tmp_path, signals_at=(13, signal.SIGINT, signal.SIGINT), shard_images=8)
    assert exit_code(job) == 130
    assert len(rows_of(tmp_path)) == 8
    assert leftovers(tmp_path) == []
    assert run_job(pictures, tmp_path, shard_images=8).complete
    assert rows_of(tmp_path) == expected
