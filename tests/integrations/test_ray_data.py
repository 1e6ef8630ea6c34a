"""Ray Data on a real local cluster of two nodes: the rows of a local job, and none lost with a worker that dies."""

import json
import logging
import os
import signal
import sys
import tarfile
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ray = pytest.importorskip("ray", reason="needs ray: pip install 'qwenvit[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from qwenvit.datasets.job import encode_dataset  # noqa: E402
from qwenvit.integrations import ray_data  # noqa: E402

OPTIONS = {"min_pixels": 1024, "pool": "mean", "normalize": True}
COUNT = 24
BROKEN = ("trip/007.png", "020.png")


@pytest.fixture(scope="module")
def cluster():
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 150 * 2**20})
    nodes.add_node(num_cpus=2, object_store_memory=150 * 2**20)
    ray.init(address=nodes.address, logging_level=logging.ERROR, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    assert len(ray.nodes()) == 2
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "trip").mkdir()
    for index in range(COUNT):
        name = f"trip/{index:03d}.png" if index % 3 == 1 else f"{index:03d}.png"
        pixels = np.random.default_rng(index).integers(0, 256, (33 + index % 5 * 17, 40 + index % 3 * 23, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    for name in BROKEN:
        (folder / name).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def local_rows(photos, tmp_path_factory):
    """Return the rows of a local job by id."""
    output = tmp_path_factory.mktemp("local")
    with warnings.catch_warnings(action="ignore"):
        encode_dataset(photos, output, model="demo", devices="cpu", format="parquet", **OPTIONS)
    errors = [json.loads(line)["id"] for line in (output / "errors.jsonl").read_text().splitlines()]
    assert sorted(errors) == sorted(BROKEN)
    rows = {row["id"]: row for row in pq.read_table(output / "00000.parquet").to_pylist()}
    assert len(rows) == COUNT - len(BROKEN)
    return rows


class KilledOnce(ray_data.EmbedImages):
    """Kills its process in the middle of its second batch, in one of the workers, once."""

    def __init__(self, *arguments, marker, **options):
        super().__init__(*arguments, **options)
        self.marker, self.batches = marker, 0

    def __call__(self, batch):
        self.batches += 1
        for part in super().__call__(batch):
            if self.batches == 2:
                try:
                    os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), signal.SIGKILL)
                except FileExistsError:
                    pass
            yield part


def check(rows, local_rows):
    assert sorted(row["id"] for row in rows) == sorted([*local_rows, *BROKEN])  # each once
    for row in rows:
        error = row.pop("error")
        if row["id"] in BROKEN:
            assert "expected an image file" in error
            assert row["path"].endswith(row["id"])
            assert row["tokens"] is row["pooled"] is row["grid"] is None
        else:
            assert error is None
            expected = local_rows[row["id"]]
            assert row == expected, row["id"]


def test_rows_are_those_of_a_local_job_though_a_worker_is_killed(cluster, photos, local_rows, tmp_path, monkeypatch):
    marker = tmp_path / "killed"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module
    monkeypatch.setattr(ray_data, "EmbedImages", KilledOnce)
    images = ray.data.read_binary_files(str(photos), include_paths=True, override_num_blocks=6)
    arguments = {"model": "demo", "root": str(photos), "concurrency": 2, "num_gpus": 0, "batch_size": 4}
    arguments |= OPTIONS | {"marker": str(marker)}
    found = ray_data.embed_dataset(images, str(tmp_path / "out"), **arguments)
    assert marker.exists()
    check(found.take_all(), local_rows)
    files = list((tmp_path / "out").glob("*.parquet"))
    check([row for file in files for row in pq.read_table(file).to_pylist()], local_rows)
    with pytest.raises(ValueError, match="already exists"):  # a second time, all rows would be there twice
        ray_data.embed_dataset(images, str(tmp_path / "out"), **arguments)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_what_rays_readers_return_is_embedded(cluster, photos, local_rows, tmp_path, kind):
    names = [name for name in local_rows if "/" not in name][:3]
    if kind == "webdataset":
        with tarfile.open(tmp_path / "0.tar", "w") as archive:
            for name in names:
                archive.add(photos / name, name)
        images = ray.data.read_webdataset(str(tmp_path / "0.tar"), decoder=None)
    else:
        structs = [{"bytes": (photos / name).read_bytes(), "path": None} for name in names]
        pq.write_table(pa.table({"id": names, "image": structs}), tmp_path / "0.parquet")
        images = ray.data.read_parquet(str(tmp_path / "0.parquet"))
    found = ray_data.embed_dataset(images, model="demo", num_gpus=0, **OPTIONS).take_all()
    assert len(found) == len(names)
    for row in found:
        name = row["id"] if kind == "parquet" else f"{row['id']}.png"
        assert row["error"] is None
        assert row["tokens"] == local_rows[name]["tokens"]
        assert list(row["pooled"]) == local_rows[name]["pooled"]


def test_columns_of_every_kind(photos, local_rows):
    """Without a cluster: the callable alone, on tables as Ray passes them."""
    with warnings.catch_warnings(action="ignore"):
        embed = ray_data.EmbedImages("demo", device="cpu", **OPTIONS)
    names = sorted(local_rows)[:4]
    data = [(photos / name).read_bytes() for name in names]
    structs = [{"bytes": data[0], "path": "x"}, {"bytes": None, "path": str(photos / names[1])}]
    arrays = [np.asarray(Image.open(photos / name)) for name in names[:2]]
    tables = {
        "bytes": pa.table({"path": names, "bytes": data}),
        "paths": pa.table({"id": names, "image": [str(photos / name) for name in names]}),
        "structs": pa.table({"id": names[:2], "image": structs}),
        "webdataset": pa.table({"__key__": names, "jpg": data}),
        "arrays": ray.data.from_items(
            [{"id": name, "image": array} for name, array in zip(names[:2], arrays, strict=True)]
        ).take_batch(2, batch_format="pyarrow")
        if ray.is_initialized()
        else None,
    }
    for kind, table in tables.items():
        if table is None:
            continue
        rows = [row for part in embed(table) for row in part.to_pylist()]
        assert [row["id"] for row in rows] == names[: len(rows)], kind
        for row in rows:
            assert row["error"] is None, kind
            assert row["tokens"] == local_rows[row["id"]]["tokens"], kind
            assert row["pooled"] == local_rows[row["id"]]["pooled"], kind


def test_columns_that_are_not_there_are_named(local_rows):
    with warnings.catch_warnings(action="ignore"):
        embed = ray_data.EmbedImages("demo", device="cpu")
    with pytest.raises(ValueError, match=r"column: expected one of image, .* among the columns, got id, picture"):
        list(embed(pa.table({"id": ["a"], "picture": [b""]})))
    with pytest.raises(ValueError, match="id_column: expected one of id, path, __key__ among the columns, got image"):
        list(embed(pa.table({"image": [b""]})))
    (part,) = embed(pa.table({"id": ["a"], "image": [{"bytes": b"", "path": __file__}]}))
    assert "got an empty one" in part.to_pylist()[0]["error"]  # as in a local job
    (part,) = embed(pa.table({"id": ["a"], "image": [5]}))
    assert "expected bytes, a path" in part.to_pylist()[0]["error"]
    with pytest.raises(TypeError, match="min_pixel"):
        ray_data.EmbedImages("demo", min_pixel=5)
