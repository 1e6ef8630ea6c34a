"""Byte ranges of a real HTTP server: what is retried, what is refused, and how a download resumes."""

import errno
import random
import shutil
from collections.abc import Iterator
from itertools import pairwise

import pytest

from qwenvit.weights.hub import ranges, reader
from qwenvit.weights.hub.ranges import Chunk, download, journal_path
from qwenvit.weights.hub.reader import HubReader, StatusError, TransferError, Version
from support.hub_server import Hub

DATA = random.Random(0).randbytes(300_000).replace(b"\0", b"\1")  # zeros are bytes that were not written


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(reader, "RETRY_WAITS_S", (0.0, 0.0))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "data").write_bytes(DATA)
    with Hub(folder) as server:
        yield server


def read(server: Hub, first: int, length: int) -> bytes:
    return b"".join(HubReader({}).stream(f"{server.url}/org/model/resolve/main/data", first, length))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_statuses_of_a_busy_server_are_retried(server, status):
    server.statuses = [status, status]
    assert read(server, 10, 100) == DATA[10:110]
    assert len(server.requests) == 3
    server.statuses = [status] * 3
    with pytest.raises(TransferError, match=rf"bytes 10 to 110 did not arrive.*{status}"):
        read(server, 10, 100)
    assert len(server.requests) == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 501])
def test_other_statuses_are_errors_at_once(server, status):
    server.statuses = [status]
    with pytest.raises(StatusError) as error:
        read(server, 10, 100)
    assert error.value.status == status
    assert len(server.requests) == 1


@pytest.mark.parametrize("start", [0, 1, 11, 13, 120])
def test_a_part_from_another_byte_is_refused(server, start):
    server.starts = start
    with pytest.raises(ValueError, match=rf"from byte 12 on, got status 206 and Content-Range 'bytes {start}-"):
        read(server, 12, 100)


@pytest.mark.parametrize("first", [0, 12])
def test_a_retry_that_starts_over_is_refused(server, first):
    server.drops, server.starts = 1, first
    with pytest.raises(ValueError, match=rf"from byte \d{{5,}} on, got status 206 and Content-Range 'bytes {first}-"):
        read(server, first, 250_000)


class Memory(HubReader):
    """Reads DATA, and lists the first byte of each range."""

    def __init__(self) -> None:
        super().__init__({})
        self.firsts: list[int] = []

    def stream(self, url: str, first: int, length: int, stop: object = None) -> Iterator[bytes]:  # noqa: ARG002
        self.firsts.append(first)
        yield DATA[first : first + length]


def test_a_chunk_that_ends_early_is_refused_and_not_recorded(tmp_path):
    """The file on the server may have become shorter since its header was read."""
    file, end = tmp_path / "file", len(DATA)
    chunks = [Chunk("url", 0, 4, 100), Chunk("url", end - 100, 104, 110)]
    with pytest.raises(ValueError, match=f"url: truncated: expected 110 bytes at byte {end - 100}, got 100"):
        download(Memory(), chunks, b"head", file, "")
    assert "1" not in journal_path(file).read_text().split("\n")[1:]


def test_a_kept_chunk_whose_bytes_have_changed_is_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "THREADS", 1)
    head, file = b"head", tmp_path / "file"
    chunks = [Chunk("url", 1000 * index, 4 + 1000 * index, 1000) for index in range(10)]
    download(Memory(), chunks, head, file, "")
    expected = file.read_bytes()
    for changed in (4, 5002, len(expected) - 1):
        data = bytearray(expected)
        data[changed] ^= 1
        file.write_bytes(data)
        reader = Memory()
        download(reader, chunks, head, file, "")
        assert reader.firsts == [(changed - 4) // 1000 * 1000]
        assert file.read_bytes() == expected
    file.write_bytes(expected[:5500])
    reader = Memory()
    download(reader, chunks, head, file, "")
    assert reader.firsts == [5000, 6000, 7000, 8000, 9000]
    assert file.read_bytes() == expected


def test_kept_chunks_of_another_version_of_the_remote_file_do_not_count(tmp_path):
    file, chunks = tmp_path / "file", [Chunk("url", 0, 0, 100)]
    for etag, asked in (("a", [0]), ("a", []), ("b", [0]), (None, [0])):
        reader = Memory()
        reader.versions["url"] = Version(len(DATA), etag, None)
        download(reader, chunks, b"", file, "")
        assert reader.firsts == asked


def test_a_file_that_does_not_fit_on_the_disk_is_refused_before_a_request(tmp_path, monkeypatch):
    file, chunks = tmp_path / "file", [Chunk("url", 0, 0, 100_000)]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=99_999))
    with pytest.raises(OSError, match="needs 100,000 bytes more, but its disk has only 99,999 free") as error:
        download(Memory(), chunks, b"", file, "")
    assert error.value.errno == errno.ENOSPC
    assert not file.exists()
    # What a part of the file already takes need not be free.
    file.write_bytes(bytes(50_000))
    download(Memory(), chunks, b"", file, "")
    assert file.read_bytes() == DATA[:100_000]


def test_a_range_of_2_to_the_60_bytes_makes_no_chunks(tmp_path):
    with pytest.raises(OSError, match="its disk has only"):
        download(Memory(), [Chunk("url", 0, 0, 1 << 60)], b"", tmp_path / "file", "")


def test_after_a_power_cut_at_any_byte_of_the_journal_only_listed_chunks_count(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "THREADS", 1)
    monkeypatch.setattr(ranges.os, "fsync", lambda _: None)
    head, file = b"head", tmp_path / "file"
    data, edges = DATA[:4000], range(0, 4001, 250)
    chunks = [Chunk("url", first, len(head) + first, end - first) for first, end in pairwise(edges)]

    def resume() -> list[int]:
        reader = Memory()
        download(reader, chunks, head, file, "test")
        assert file.read_bytes() == head + data
        return reader.firsts

    assert resume() == [*edges[:-1]]
    plan, *lines = journal_path(file).read_text().splitlines(keepends=True)
    assert sorted(int(line.split()[0]) for line in lines) == [*range(16)]
    whole = "".join([plan, *lines])
    for cut in [0, 1, *range(len(plan) - 1, len(plan) + 150), *range(len(plan) + 150, len(whole) + 1, 11)]:
        listed = [int(line.split()[0]) for line in whole[:cut].split("\n")[1:] if len(line.partition(" ")[2]) == 64]
        parts = [
            data[first:end] if i in listed else bytes(end - first) for i, (first, end) in enumerate(pairwise(edges))
        ]
        file.write_bytes(head + b"".join(parts))
        journal_path(file).write_text(whole[:cut])
        assert resume() == [first for i, first in enumerate(edges[:-1]) if i not in listed]
        assert resume() == []
