"""What a job writes: rows, shards and a manifest, or nothing at all if its settings are impossible."""

import itertools
import json

import numpy as np
import pytest
import torch

import qwenvit
from qwenvit.datasets.embed import copy_batch
from qwenvit.datasets.find import find_records
from qwenvit.datasets.options import JobOptions, hash_weights
from qwenvit.datasets.record import Record
from qwenvit.item_stream import encode_stream
from support.jobs import bytes_of, rows_of, run_job

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
