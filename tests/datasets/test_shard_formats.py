"""Shard writers: what official readers find in a shard is what was added, to the last bit."""

import errno
import gc
import io
import json
import random
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import qwenvit
from qwenvit.datasets.formats import SUFFIXES, check_format, open_writer, parquet, safetensors
from qwenvit.datasets.item import EncodedItem, ShardLayout
from qwenvit.datasets.record import Bytes, Record
from qwenvit.outputs import VideoTimes
from qwenvit.weights.header import read_header
from support.towers import SMALL, narrow

ODD_NAMES = [
    "plain.png",
    'quote".png',
    "back\\slash",
    "new\nline\t",
    "emoji 😀.jpg",
    "ü/é",
    "a.tar/b.jpg",
    "pooled",
    " ",
    "\x1b[31m",
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def layout_of(config=SMALL["qwen3_vl"], dtype=torch.bfloat16, has_tokens=True, has_pooled=True):
    metadata = {"pool": '"mean"', "format": '"any"', "max_pixels": "1024", "resize": "null"}
    return ShardLayout(config, "some/model", dtype, has_tokens, has_pooled, metadata)


def items_of(layout, names=tuple(ODD_NAMES), seed=0):
    """Return items of several sizes, every third a video; some videos' times are unknown."""
    generator, found = torch.Generator().manual_seed(seed), []
    for index, name in enumerate(names):
        grid = (1 + index % 3, 1 + index % 4, 2)
        size = grid[0] * grid[1] * grid[2]
        levels = 1 + len(layout.config.deepstack_visual_indexes)
        layers = torch.randn(levels, size, layout.config.out_hidden_size, generator=generator).to(layout.dtype)
        pooled = torch.randn(layout.config.out_hidden_size, generator=generator)
        is_video = index % 3 == 2
        times = VideoTimes(tuple(0.5 + i for i in range(grid[0])), 1.0) if is_video and index % 2 else None
        tokens, *deepstack = layers if layout.has_tokens else [None]
        record = Record(name, f"stamp-{index}", f"/data/{name}", Bytes(b""), is_video)
        vector = pooled if layout.has_pooled else None
        found.append(EncodedItem(record, grid, size, tokens, deepstack, vector, is_video, times))
    return found


def write(path, format_name, layout, items):
    """Write a shard, overwriting every tensor after it was added, as a job does."""
    with path.open("w+b") as stream:
        writer = open_writer(format_name, stream, layout)
        sizes = [writer.num_bytes]
        for item in items:
            given = replace(
                item,
                tokens=None if item.tokens is None else item.tokens.clone(),
                deepstack=[layer.clone() for layer in item.deepstack],
                pooled=None if item.pooled is None else item.pooled.clone(),
            )
            writer.add(given)
            for tensor in (given.tokens, given.pooled, *given.deepstack):
                if tensor is not None:
                    tensor.fill_(float("nan"))
            sizes.append(writer.num_bytes)
        writer.finish()
        assert not stream.closed
    assert [after - before for before, after in pairwise(sizes)] == [i.num_bytes for i in items]
    return path


def same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reserve", [4096, 16])
@pytest.mark.parametrize("has_pooled", [True, False])
def test_safetensors_have_every_tensor_under_todays_names(tmp_path, monkeypatch, dtype, reserve, has_pooled):
    monkeypatch.setattr(safetensors, "FIRST_RESERVE", reserve)
    monkeypatch.setattr(safetensors, "RESERVE_GROWTH", 2)
    monkeypatch.setattr(safetensors, "BLOCK", 1000)
    layout = layout_of(dtype=dtype, has_pooled=has_pooled)
    items = items_of(layout)
    path = write(tmp_path / "0.safetensors", "safetensors", layout, items)
    tensors = load_file(path)
    read_header(path)  # our own, stricter reader
    for item in items:
        same_bits(tensors.pop(f"{item.record.id}/tokens"), item.tokens)
        for level, layer in enumerate(item.deepstack):
            same_bits(tensors.pop(f"{item.record.id}/deepstack.{level}"), layer)
    if has_pooled:
        same_bits(tensors.pop("pooled"), torch.stack([item.pooled for item in items]))
    assert tensors == {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert list(json.loads(metadata["grids"])) == [item.record.id for item in items]
    assert json.loads(metadata["settings"]) == {"pool": "mean", "format": "any", "max_pixels": 1024, "resize": None}
    loaded = qwenvit.load_embeddings(path)
    for item in items:
        found = loaded[item.record.id]
        same_bits(found.tokens, item.tokens)
        assert (found.grid, found.is_video, found.times) == (item.grid, item.is_video, item.times)
        assert found.config == layout.config
        assert len(found.deepstack) == len(item.deepstack) == 3


def test_tensors_are_aligned_where_tokens_have_an_odd_number_of_bytes(tmp_path):
    config = narrow("qwen2_vl", depth=1, out_hidden_size=25)
    layout = layout_of(config, torch.bfloat16)
    items = [replace(one, tokens=one.tokens[:1], num_tokens=1, grid=(1, 1, 1)) for one in items_of(layout, ["a"])]
    path = write(tmp_path / "0.safetensors", "safetensors", layout, items)
    same_bits(load_file(path)["pooled"][0], items[0].pooled)
    same_bits(qwenvit.load_embeddings(path)["a"].tokens, items[0].tokens)
    starts = {name: (entry.start, entry.dtype) for name, entry in read_header(path).items()}
    assert starts["pooled"][0] % 4 == 0


def test_the_header_moves_what_is_written_rarely(tmp_path):
    """Of 3,000 rows: what was moved is a small part of the file, and the header's padding too."""
    layout = layout_of()
    items = items_of(layout, [f"{index:08d}.jpg" for index in range(3000)])

    class Counting(io.BytesIO):
        written = 0

        def write(self, data):
            self.written += len(data)
            return super().write(data)

    stream = Counting()
    writer = open_writer("safetensors", stream, layout)
    for item in items:
        writer.add(item)
    writer.finish()
    size = len(stream.getvalue())
    assert stream.written < 1.4 * size
    (tmp_path / "a.safetensors").write_bytes(stream.getvalue())
    assert len(load_file(tmp_path / "a.safetensors")) == 3000 * 4 + 1


def test_little_of_a_safetensors_shard_is_moved(tmp_path, monkeypatch):
    """The length of its header is foreseen after a small part: a shard of real tokens has a gigabyte."""
    monkeypatch.setattr(safetensors, "SHARD_BYTES", 2**25)
    layout = layout_of(SMALL["qwen2_5_vl"], dtype=torch.float16, has_pooled=False)
    (item,) = items_of(layout, ["0"])
    tokens = torch.zeros(2**16, dtype=torch.float16)

    class Counting(io.BytesIO):
        moved = 0

        def read(self, size=-1):
            self.moved += size
            return super().read(size)

    stream = Counting()
    writer = open_writer("safetensors", stream, layout)
    for number in range(2**25 // tokens.nbytes):
        record = replace(item.record, id=f"{number:08d}.jpg")
        writer.add(replace(item, record=record, tokens=tokens))
    writer.finish()
    assert 0 < stream.moved < 0.2 * 2**25
    (tmp_path / "a.safetensors").write_bytes(stream.getvalue())
    (header_bytes,) = struct.unpack("<Q", stream.getvalue()[:8])
    assert (8 + header_bytes) % safetensors.ALIGNMENT == 0
    with safe_open(tmp_path / "a.safetensors", "np") as opened:
        assert all(opened.get_tensor(name).flags.aligned for name in opened.keys())  # noqa: SIM118
    assert len(stream.getvalue()) < 1.05 * 2**25


def test_a_safetensors_shard_is_full_before_readers_refuse_its_header(monkeypatch):
    monkeypatch.setattr(safetensors, "FULL_HEADER_BYTES", 10_000)
    layout = layout_of(has_tokens=False)
    stream = io.BytesIO()
    writer = open_writer("safetensors", stream, layout)
    rows = 0
    for item in items_of(layout, [f"{index:0200d}" for index in range(1000)]):
        writer.add(item)
        rows += 1
        if writer.is_full:
            break
    writer.finish()
    assert 20 < rows < 50
    length = int.from_bytes(stream.getvalue()[:8], "little")
    assert length < 2 * 10_000  # spaces included
    assert 9_500 < len(stream.getvalue()[8 : 8 + length].rstrip()) < 11_000


@pytest.mark.parametrize(("rows", "fits"), [(40, True), (400, False)])
def test_a_header_that_is_longer_than_foreseen_overwrites_no_tensor(tmp_path, monkeypatch, rows, fits):
    monkeypatch.setattr(safetensors, "FULL_HEADER_BYTES", 10_016)
    layout = layout_of(has_tokens=False)
    items = items_of(layout, [f"{index:0200d}" for index in range(rows)])
    with (tmp_path / "a.safetensors").open("w+b") as stream:
        writer = open_writer("safetensors", stream, layout)
        for item in items:
            writer._header_bytes = 0
            writer.add(item)
        if not fits:
            with pytest.raises(ValueError, match="expected a header of at most 20032 bytes"):
                writer.finish()
            return
        writer.finish()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["pooled"], torch.stack([item.pooled for item in items]))


def test_vectors_without_tokens(tmp_path):
    layout = layout_of(has_tokens=False)
    items = items_of(layout)
    expected = torch.stack([item.pooled for item in items])
    path = write(tmp_path / "0.safetensors", "safetensors", layout, items)
    tensors = load_file(path)
    assert tensors.keys() == {"pooled"}
    same_bits(tensors["pooled"], expected)
    with pytest.raises(ValueError, match="vectors without tokens"):
        qwenvit.load_embeddings(path)
    table = pq.read_table(write(tmp_path / "0.parquet", "parquet", layout, items))
    assert "tokens" not in table.column_names
    found = table["pooled"].combine_chunks().flatten().to_numpy().reshape(len(items), -1)
    same_bits(torch.from_numpy(found.copy()), expected)
    array = np.load(write(tmp_path / "0.npy", "npy", layout, items), mmap_mode="r", allow_pickle=False)
    assert array.flags.c_contiguous
    same_bits(torch.from_numpy(np.array(array)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_pooled", [True, False])
@pytest.mark.parametrize("group", [1, 10_000])
def test_parquet_has_every_row(tmp_path, monkeypatch, dtype, has_pooled, group):
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", group)
    layout = layout_of(dtype=dtype, has_pooled=has_pooled)
    items = items_of(layout)
    path = write(tmp_path / "0.parquet", "parquet", layout, items)
    assert pq.ParquetFile(path).num_row_groups == -(-len(items) // group)
    rows = pq.read_table(path).to_pylist()
    for row, item in zip(rows, items, strict=True):
        assert (row["id"], row["path"]) == (item.record.id, item.record.path)
        assert (tuple(row["grid"]), row["num_tokens"]) == (item.grid, item.num_tokens)
        assert (row["is_video"], row["timestamps"]) == (item.is_video, item.times and list(item.times.timestamps))
        assert row["second_per_grid"] == (item.times and item.times.second_per_grid)
        read_dtype = getattr(torch, row["tokens_dtype"])
        for data, layer in zip([row["tokens"], *row["deepstack"]], [item.tokens, *item.deepstack], strict=True):
            same_bits(torch.frombuffer(bytearray(data), dtype=read_dtype).view(row["num_tokens"], -1), layer)
        if has_pooled:
            assert row["pooled"] == item.pooled.tolist()
    metadata = pq.read_schema(path).metadata
    assert json.loads(metadata[b"settings"])["max_pixels"] == 1024
    assert json.loads(metadata[b"config"]) == layout.config.to_hf()


def test_row_groups_end_where_their_tensors_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 2000)
    layout = layout_of()
    items = items_of(layout)
    file = pq.ParquetFile(write(tmp_path / "0.parquet", "parquet", layout, items))
    assert 1 < file.num_row_groups < len(items)
    assert file.read()["id"].to_pylist() == [item.record.id for item in items]


@pytest.mark.parametrize("format_name", SUFFIXES)
def test_equal_rows_give_equal_bytes_and_other_rows_others(tmp_path, format_name):
    layout = layout_of(has_tokens=format_name != "npy")
    items = items_of(layout)
    shards = [write(tmp_path / str(i), format_name, layout, items).read_bytes() for i in range(2)]
    assert shards[0] == shards[1]
    random.Random(0).shuffle(items)
    assert write(tmp_path / "other", format_name, layout, items).read_bytes() != shards[0]


@pytest.mark.parametrize("format_name", SUFFIXES)
def test_a_row_without_what_the_layout_says_is_refused(format_name):
    layout = layout_of(has_tokens=format_name != "npy")
    (item,) = items_of(layout, ["name"])
    writer = open_writer(format_name, io.BytesIO(), layout)
    with pytest.raises(ValueError, match="name: expected a vector"):
        writer.add(replace(item, pooled=None))
    if layout.has_tokens:
        with pytest.raises(ValueError, match="name: expected tokens"):
            writer.add(replace(item, tokens=None, deepstack=[]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("csv", True, True), "format: expected one of safetensors, parquet, npy, got 'csv'"),
        (("safetensors", False, False), "tokens: expected True where pool is None"),
        (("npy", True, True), "format: 'npy' has vectors only"),
        (("npy", True, False), "format: 'npy' has vectors only"),
    ],
)
def test_formats_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_format(*arguments)


def test_parquet_without_pyarrow_says_what_to_install():
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from qwenvit.datasets.formats import check_format\n"
        "check_format('safetensors', True, False), check_format('npy', False, True)\n"
        "try: check_format('parquet', True, False)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "format: 'parquet' needs pyarrow: pip install 'qwenvit[parquet]'\n"


class FullDisk(io.BytesIO):
    def write(self, data):
        if self.tell() + len(data) > 6000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.filterwarnings("error")  # also of what happens when the writer is deleted
@pytest.mark.parametrize("format_name", SUFFIXES)
def test_a_full_disk_is_told_as_such(monkeypatch, format_name):
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 2)
    layout = layout_of(has_tokens=format_name != "npy")
    with FullDisk() as stream:
        writer = open_writer(format_name, stream, layout)
        with pytest.raises(OSError, match="No space left") as raised:
            list(map(writer.add, items_of(layout) * 50))
    assert raised.value.errno == errno.ENOSPC
    del writer
    gc.collect()
