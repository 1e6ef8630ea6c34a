"""A job whose folder has something in it: what it keeps, encodes again, and refuses."""

import json
import os

import pytest

from qwenvit.datasets.progress import ItemReport
from support.jobs import make_pictures, rows_of, run_job


def test_the_same_call_encodes_only_what_is_new(pictures, tmp_path):
    run_job(pictures, tmp_path / "out")
    before = rows_of(tmp_path / "out")
    make_pictures(pictures / "more", 2)
    seen: list[ItemReport] = []
    last = []
    manifest = run_job(pictures, tmp_path / "out", on_item=seen.append, progress=last.append)
    assert [report.id for report in seen] == ["more/0000.png", "more/0001.png"]
    assert (last[-1].encoded, last[-1].skipped, last[-1].failed, last[-1].expected) == (2, 7, 0, 9)
    assert 0 <= last[-1].waiting <= 1
    assert manifest.counts["images"] == 9
    assert before.items() <= rows_of(tmp_path / "out").items()
    assert len(rows_of(tmp_path / "out")) == 9


def test_a_failure_is_told_and_tried_again(pictures, tmp_path):
    broken, gone = pictures / "0003.png", pictures / "0004.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:60])
    gone.write_bytes(b"")
    seen: list[ItemReport] = []
    manifest = run_job(pictures, tmp_path / "out", on_item=seen.append)
    assert manifest.counts["failed"] == 2
    assert manifest.complete
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").open()]
    assert [error["id"] for error in errors] == ["0003.png", "0004.png"]
    assert "broken image file" in errors[0]["reason"]
    assert [report.id for report in seen if report.error] == ["0003.png", "0004.png"]
    broken.write_bytes(good)
    gone.unlink()
    manifest = run_job(pictures, tmp_path / "out")
    assert manifest.counts["failed"] == 0
    assert (tmp_path / "out" / "errors.jsonl").read_text() == ""
    assert rows_of(tmp_path / "out").keys() == {path.name for path in pictures.iterdir()}


@pytest.mark.parametrize("verify", [False, True])
def test_a_changed_input_keeps_its_row_and_is_a_failure(pictures, tmp_path, verify):
    run_job(pictures, tmp_path / "out", verify=verify)
    before = rows_of(tmp_path / "out")
    path = pictures / "0002.png"
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    os.utime(path, ns=(times[0], times[1] + 1))
    manifest = run_job(pictures, tmp_path / "out", verify=verify)
    assert manifest.counts["failed"] == (0 if verify else 1)  # the hash is the same
    path.write_bytes((pictures / "0003.png").read_bytes())
    manifest = run_job(pictures, tmp_path / "out", verify=verify)
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").open())
    assert error["id"] == "0002.png"
    assert "changed since it was encoded" in error["reason"]
    assert (manifest.counts["images"], manifest.counts["failed"]) == (7, 1)
    assert rows_of(tmp_path / "out") == before
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert run_job(pictures, tmp_path / "out", verify=verify).counts["failed"] == 0


def test_removing_a_shard_encodes_its_rows_again(pictures, tmp_path):
    run_job(pictures, tmp_path / "out", shard_images=3)
    before = rows_of(tmp_path / "out")
    (tmp_path / "out" / "00001.safetensors").unlink()
    manifest = run_job(pictures, tmp_path / "out", shard_images=3)
    assert rows_of(tmp_path / "out") == before
    assert manifest.counts["images"] == 7
    (tmp_path / "out" / "00002.index.jsonl").unlink()
    with pytest.raises(ValueError, match=r"00002.index.jsonl beside it"):
        run_job(pictures, tmp_path / "out", shard_images=3)


def test_other_settings_are_refused_by_name_or_overwrite(pictures, tmp_path):
    run_job(pictures, tmp_path / "out", shard_images=3)
    before = rows_of(tmp_path / "out")
    with pytest.raises(ValueError, match=r"pool 'mean', now 'patches'") as refused:
        run_job(pictures, tmp_path / "out", pool="patches", max_pixels=50_000)
    with pytest.raises(ValueError, match=r"max_pixels 16777216, now 50000; min_pixels 1024, now 2048"):
        run_job(pictures, tmp_path / "out", min_pixels=2048, max_pixels=50_000)
    with pytest.raises(ValueError, match=r"dtype 'float32', now 'bfloat16'.*weights 'sha256:"):
        run_job(pictures, tmp_path / "out", dtype="bfloat16")
    assert "dtype" not in str(refused.value)
    assert rows_of(tmp_path / "out") == before
    assert run_job(pictures, tmp_path / "out", overwrite=True).complete  # the settings are the same
    assert rows_of(tmp_path / "out") == before
    manifest = run_job(pictures, tmp_path / "out", max_pixels=50_000, overwrite=True)
    assert manifest.settings["max_pixels"] == 50_000
    assert manifest.counts["shards"] == len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_a_folder_that_no_job_wrote_stays_as_it_is(pictures, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "00000.safetensors").write_bytes(b"someone's")
    with pytest.raises(ValueError, match="expected a folder without shards"):
        run_job(pictures, out)
    (out / "manifest.json").write_text('{"name": "an extension of a browser"}')
    with pytest.raises(ValueError, match="expected the manifest of a qwenvit job"):
        run_job(pictures, out, overwrite=True)
    assert (out / "00000.safetensors").read_bytes() == b"someone's"


def test_an_index_that_is_damaged_is_named(pictures, tmp_path):
    run_job(pictures, tmp_path / "out", shard_images=3)
    index = tmp_path / "out" / "00001.index.jsonl"
    good = index.read_text()
    index.write_text(good[:-20])
    with pytest.raises(ValueError, match=r"00001.index.jsonl: line 3: expected a row"):
        run_job(pictures, tmp_path / "out")
    index.write_text(good + (tmp_path / "out" / "00000.index.jsonl").read_text())
    with pytest.raises(ValueError, match=r"line 4: expected one row for an id, got a second for '0000.png'"):
        run_job(pictures, tmp_path / "out")


def test_a_done_input_that_is_gone_is_not_called_changed(pictures, tmp_path):
    run_job(pictures, tmp_path / "out")
    (pictures / "0002.png").unlink()
    (pictures / "0002.png").symlink_to("nowhere.png")
    assert run_job(pictures, tmp_path / "out").counts == {"images": 7, "failed": 1} | _sizes(tmp_path / "out")
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").open())
    assert error["id"] == "0002.png"
    assert "changed" not in error["reason"]


def _sizes(output):
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    return {key: counts[key] for key in ("tokens", "shards", "bytes")}
