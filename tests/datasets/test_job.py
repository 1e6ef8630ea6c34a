"""A job's output, how it continues, and what it refuses."""

import errno
import itertools
import json
import os
import threading
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import qwenvit
from qwenvit.datasets import ledger as ledger_module
from qwenvit.datasets import shard_stream
from qwenvit.datasets.embed import copy_batch
from qwenvit.datasets.find import find_records
from qwenvit.datasets.ledger import Encoded
from qwenvit.datasets.manifest import Manifest
from qwenvit.datasets.options import JobOptions, hash_weights
from qwenvit.datasets.progress import ItemReport, Meter
from qwenvit.datasets.record import Record
from qwenvit.datasets.shard_folder import ShardReport
from qwenvit.encoder import Encoder
from qwenvit.item_stream import encode_stream
from qwenvit.outputs import Embeddings
from support.jobs import bytes_of, exit_code, make_pictures, rows_of, run_job, start_job

JOB = JobOptions(
    model="demo",
    loading={},
    format="safetensors",
    pool="mean",
    normalize=False,
    tokens=True,
    shard_images=1,
    shard_bytes=1,
    num_workers=0,
    decode="pillow",
    video=False,
    verify=False,
    image_column=None,
    image={},
)


@pytest.fixture(scope="module")
def encoder():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Encoder.from_pretrained("demo", device="cpu")


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / "pictures", 7)


def test_rows_are_what_the_encoder_returns_for_each_image(encoder, pictures, tmp_path):
    manifest = run_job(pictures, tmp_path / "out", shard_images=3, normalize=True)
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == {path.name for path in pictures.iterdir()}
    for name, row in rows.items():
        (item,) = encoder.encode(pictures / name, min_pixels=1024)
        assert row["grid"] == str(list(item.grid)).encode()
        assert row["tokens"] == bytes_of(item.tokens)
        assert [row[f"deepstack.{level}"] for level in range(3)] == [bytes_of(layer) for layer in item.deepstack]
        vector = item.tokens.double().mean(0)
        stored = torch.frombuffer(bytearray(row["pooled"]), dtype=torch.float32)
        torch.testing.assert_close(stored.double(), vector / vector.norm(), rtol=1e-5, atol=1e-6)
    assert manifest.complete
    shards = sorted(path for path in (tmp_path / "out").iterdir() if path.suffix == ".safetensors")
    assert [path.name for path in shards] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    size = sum(path.stat().st_size for path in shards)
    tokens = sum(len(row["tokens"]) // 4 // 256 for row in rows.values())
    assert manifest.counts == {"images": 7, "failed": 0, "tokens": tokens, "shards": 3, "bytes": size}


def test_the_manifest_says_how_the_rows_were_made(encoder, pictures, tmp_path):
    run_job(pictures, tmp_path / "out", max_pixels=50_000, resize="pillow", pool="patches", tokens=False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"] == {
        "model": "demo",
        "revision": None,
        "format": "safetensors",
        "tokens": False,
        "pool": "patches",
        "normalize": False,
        "decode": "pillow",
        "video": False,
        "verify": False,
        "image_column": None,
        "device": "cpu",
        "impl": "reference",
        "weights": f"sha256:{hash_weights(encoder.tower)}",
        "dtype": "float32",
        "min_pixels": 1024,
        "max_pixels": 50_000,
        "resize": "pillow",
    }
    assert manifest["versions"] == [qwenvit.__version__]
    assert manifest["config"] == json.loads(json.dumps(encoder.config.to_hf()))
    assert {name for row in rows_of(tmp_path / "out").values() for name in row} == {"pooled", "grid"}


def test_the_hash_of_the_weights_changes_with_a_bit(encoder):
    before = hash_weights(encoder.tower)
    weight = next(encoder.tower.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(torch.int32).view(-1)[0] ^= 1
    assert hash_weights(encoder.tower) != before
    with torch.no_grad():
        weight.copy_(kept)
    assert hash_weights(encoder.tower) == before


def test_shards_are_bounded_by_their_bytes(pictures, tmp_path):
    sizes = {}
    run_job(pictures, tmp_path / "whole")
    for name, row in rows_of(tmp_path / "whole").items():
        sizes[name] = sum(len(content) for key, content in row.items() if key != "grid")
    limit = 2 * max(sizes.values())
    run_job(pictures, tmp_path / "out", shard_bytes=limit)
    indexes = sorted((tmp_path / "out").glob("*.index.jsonl"))
    shards = [[sizes[json.loads(line)["id"]] for line in index.open()] for index in indexes]
    assert all(sum(shard) <= limit for shard in shards)
    assert all(sum(shard) + following[0] > limit for shard, following in itertools.pairwise(shards))
    assert len(shards) > 1
    run_job(pictures, tmp_path / "one", shard_bytes=1)  # an item that is larger has a shard of its own
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


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


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"pool": "max"}, ValueError, "mode: expected 'mean' or 'patches', got 'max'"),
        ({"pool": None, "normalize": True}, ValueError, "normalize: expected False without pooling"),
        ({"shard_images": 0}, ValueError, "shard_images: expected a positive integer, got 0"),
        ({"shard_bytes": 1.5}, ValueError, "shard_bytes: expected a positive integer, got 1.5"),
        ({"format": "csv"}, ValueError, "format: expected one of"),
        ({"pool": None, "tokens": False}, ValueError, "output would be empty"),
        ({"num_workers": -1}, ValueError, "num_workers"),
        ({"max_pixel": 5}, TypeError, "max_pixel"),
        ({"video": True, "max_tokens": 9}, ValueError, "max_tokens: expected None with video"),
        ({"do_rescale": False}, TypeError, "do_rescale: expected nothing"),
        ({"devices": []}, ValueError, "devices: expected one or several"),
        ({"devices": "warp"}, ValueError, "device: 'warp' cannot be used"),
        ({"min_pixels": 10**9}, ValueError, "min_pixels"),
    ],
)
def test_what_is_impossible_is_refused_and_nothing_is_written(pictures, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        run_job(pictures, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out/*.json*"))


def test_a_loaded_encoder_may_be_passed(encoder, pictures, tmp_path):
    run_job(pictures, tmp_path / "by name")
    manifest = run_job(pictures, tmp_path / "loaded", model=encoder, devices=None)
    assert rows_of(tmp_path / "loaded") == rows_of(tmp_path / "by name")
    assert manifest.settings["model"].startswith("Encoder(qwen3_vl")
    with pytest.raises(ValueError, match="devices: expected None with a loaded encoder"):
        run_job(pictures, tmp_path / "loaded", model=encoder)


def test_each_item_of_a_batch_gets_its_own_part(encoder, pictures, tmp_path):
    """On a CPU a job has batches of one: here is one of seven, with two failures."""
    (pictures / "0002.png").write_bytes(b"no picture")
    (pictures / "0006.png").write_bytes(b"no picture")
    records = list(find_records([pictures]))
    (batch,) = encode_stream(encoder, records, Record.open, min_pixels=1024)
    outcome = copy_batch(batch.items, batch.embeddings, JOB)
    assert [report.id for report in outcome.reports] == [record.id for record in records]
    assert [bool(report.error) for report in outcome.reports] == [
        record.id in ("0002.png", "0006.png") for record in records
    ]
    found = {item.record.id: item for item in outcome.batch.items}
    assert len(found) == 5
    for name, item in found.items():
        (expected,) = encoder.encode(pictures / name, min_pixels=1024)
        torch.testing.assert_close(item.tokens, expected.tokens)
        torch.testing.assert_close(item.deepstack, expected.deepstack)
        torch.testing.assert_close(item.pooled, expected.tokens.mean(0))
        assert (item.grid, item.num_tokens) == (expected.grid, len(expected.tokens))


def test_an_image_that_is_too_much_for_the_device_fails_alone(encoder, pictures, tmp_path, monkeypatch):
    """The first batch with the third image needs too much memory, and so does the image alone."""
    run = Encoder._run
    calls = []

    def limited(self, pixel_values, grid):
        calls.append(grid.patches)
        if len(calls) in (3, 4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(self, pixel_values, grid)

    monkeypatch.setattr(Encoder, "_run", limited)
    manifest = run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    assert (manifest.counts["images"], manifest.counts["failed"]) == (6, 1)
    (error,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").open())
    assert error == {"id": "0002.png", "reason": "CUDA out of memory. Tried to allocate 2 GiB"}
    monkeypatch.setattr(Encoder, "_run", run)
    run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    run_job(pictures, tmp_path / "expected", model=encoder, devices=None)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "expected")


def test_a_batch_that_is_too_much_to_pool_is_pooled_one_by_one(encoder, pictures, tmp_path, monkeypatch):
    """On a CPU a batch is one image, so that the third fails once and is encoded by the second try."""
    pooled, calls = Embeddings.pooled, []

    def limited(self, *arguments, **options):
        calls.append(self)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pooled(self, *arguments, **options)

    monkeypatch.setattr(Embeddings, "pooled", limited)
    manifest = run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    assert (manifest.counts["images"], manifest.counts["failed"]) == (7, 0)
    assert len(calls) == 8
    monkeypatch.undo()
    run_job(pictures, tmp_path / "expected", model=encoder, devices=None)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "expected")


def test_a_failed_batch_is_released_before_its_images_are_tried_alone(encoder, pictures, tmp_path, monkeypatch):
    run, alive = Encoder._run, []

    def limited(self, pixel_values, grid):
        if len(alive) == 0:
            output = run(self, pixel_values, grid)
            alive.append(weakref.ref(output.pooler_output))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert alive[0]() is None, "the tensors of the failed batch are still there"
        return run(self, pixel_values, grid)

    monkeypatch.setattr(Encoder, "_run", limited)
    assert run_job(pictures, tmp_path / "out", model=encoder, devices=None).counts["images"] == 7


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


def test_a_folder_without_locks_is_told(pictures, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="the file system has no locks"):
        run_job(pictures, tmp_path / "out")


def test_an_error_of_the_tower_keeps_what_is_encoded(encoder, pictures, tmp_path, monkeypatch):
    run, calls = Encoder._run, []

    def breaks(self, pixel_values, grid):
        calls.append(grid)
        if len(calls) == 5:
            raise RuntimeError("the device is gone")
        return run(self, pixel_values, grid)

    monkeypatch.setattr(Encoder, "_run", breaks)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["counts"]["images"], manifest["complete"]) == (4, False)
    assert len(rows_of(tmp_path / "out")) == 4


def test_the_device_waits_for_a_slow_disk(encoder, pictures, tmp_path, monkeypatch):
    """Batches that wait for the disk are bounded, so memory is."""
    computed, written, ahead = [], [], []
    pooled, write = Embeddings.pooled, shard_stream.ShardStream._write
    gate = threading.Semaphore(0)

    def counted(self, *arguments, **options):
        computed.append(1)
        ahead.append(len(computed) - len(written))
        if len(computed) > 3:
            gate.release()
        return pooled(self, *arguments, **options)

    def slow(self, batch):
        gate.acquire(timeout=0.5)
        write(self, batch)
        written.append(1)

    monkeypatch.setattr(Embeddings, "pooled", counted)
    monkeypatch.setattr(shard_stream.ShardStream, "_write", slow)
    run_job(pictures, tmp_path / "out", model=encoder, devices=None)
    assert len(computed) == len(written) == 7
    assert max(ahead) <= shard_stream.BATCHES_WAITING + 2


def test_the_device_goes_on_while_a_shard_is_brought_to_the_disk(encoder, tmp_path, monkeypatch):
    """One shard's worth of batches further than the batches that may wait for the writer."""
    pictures = make_pictures(tmp_path / "pictures", 9)
    computed, whole, late = [], threading.Event(), []
    pooled, finish = Embeddings.pooled, shard_stream.ShardFile.finish

    def counted(self, *arguments, **options):
        computed.append(1)
        if len(computed) == 8:
            whole.set()
        return pooled(self, *arguments, **options)

    def slow(self):
        late.append(not whole.wait(10))
        return finish(self)

    monkeypatch.setattr(Embeddings, "pooled", counted)
    monkeypatch.setattr(shard_stream.ShardFile, "finish", slow)
    manifest = run_job(pictures, tmp_path / "out", model=encoder, devices=None, shard_images=3)
    assert late == [False] * 3
    assert (manifest.counts["images"], manifest.counts["shards"], manifest.complete) == (9, 3, True)


def test_the_manifest_is_written_now_and_then(encoder, pictures, tmp_path, monkeypatch):
    """After each shard if it is time, and also when it gets to be time later."""
    counts, write = [], Manifest.write
    monkeypatch.setattr(Manifest, "write", lambda self: counts.append(self.counts["images"]) or write(self))
    monkeypatch.setattr(ledger_module, "SECONDS_BETWEEN_WRITES", 100.0)
    run_job(pictures, tmp_path / "rarely", model=encoder, devices=None, shard_images=2)
    assert counts == [0, 7]
    counts.clear()
    monkeypatch.setattr(ledger_module, "SECONDS_BETWEEN_WRITES", 0.0)
    run_job(pictures, tmp_path / "often", model=encoder, devices=None, shard_images=2)
    assert counts[0] == 0
    assert counts[-1] == 7
    assert len(set(counts)) > 2
    folder = tmp_path / "later"
    folder.mkdir()
    now = [0.0]
    monkeypatch.setattr(ledger_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ledger_module, "SECONDS_BETWEEN_WRITES", 5.0)
    manifest = Manifest(folder, {"format": "npy"}, {}, [])
    ledger = ledger_module.Ledger(manifest, None, Meter(lambda: None, 1, None), None)
    for seconds, message, expected in (
        (0.0, ShardReport(1, 1, 1), [1]),
        (1.0, ShardReport(1, 1, 1), [1]),
        (4.0, Encoded([], 0.0), [1]),
        (6.0, Encoded([], 0.0), [1, 2]),
        (20.0, Encoded([], 0.0), [1, 2]),
    ):
        now[0] = seconds
        if not seconds:
            counts.clear()
        ledger.note(message)
        assert counts == expected, seconds


@pytest.mark.parametrize("tokens", [True, False])
def test_parquet_and_npy_have_the_same_vectors(pictures, tmp_path, tokens):
    tables = pytest.importorskip("pyarrow.parquet")
    run_job(pictures, tmp_path / "safetensors", shard_images=3)
    expected = rows_of(tmp_path / "safetensors")
    run_job(pictures, tmp_path / "parquet", shard_images=3, format="parquet", tokens=tokens)
    rows = [row for path in (tmp_path / "parquet").glob("*.parquet") for row in tables.read_table(path).to_pylist()]
    assert {row["id"]: np.float32(row["pooled"]).tobytes() for row in rows} == {
        name: row["pooled"] for name, row in expected.items()
    }
    run_job(pictures, tmp_path / "npy", shard_images=3, format="npy", tokens=False)
    vectors = {}
    for path in (tmp_path / "npy").glob("*.npy"):
        names = [json.loads(line)["id"] for line in path.with_suffix(".index.jsonl").open()]
        vectors |= dict(zip(names, map(np.ndarray.tobytes, np.load(path)), strict=True))
    assert vectors == {name: row["pooled"] for name, row in expected.items()}


def test_videos_are_encoded_among_images(encoder, pictures, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(pictures / "0003.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 96, "yuv420p"
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 256, (96, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    (pictures / "0004.mp4").write_bytes(b"no video")
    run_job(pictures, tmp_path / "images")
    assert "0003.mp4" not in rows_of(tmp_path / "images")
    manifest = run_job(pictures, tmp_path / "out", video=True)
    assert (manifest.counts["images"], manifest.counts["failed"]) == (8, 1)
    rows = rows_of(tmp_path / "out")
    (item,) = encoder.encode_video(pictures / "0003.mp4", min_pixels=1024)
    assert item.grid[0] > 1
    assert rows["0003.mp4"]["grid"] == str(list(item.grid)).encode()
    assert rows["0003.mp4"]["tokens"] == bytes_of(item.tokens)
    loaded = qwenvit.load_embeddings(tmp_path / "out")["0003.mp4"]
    assert loaded.is_video
    assert loaded.times == item.times
    assert rows_of(tmp_path / "images").items() <= rows.items()
