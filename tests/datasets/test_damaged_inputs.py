"""Archives and tables with bytes changed at random: reading ends, raises nothing, and never finds nothing at all."""

import io
import random
import tarfile
from contextlib import suppress

import pytest

from qwenvit.datasets.archives import read_archive
from qwenvit.datasets.tables import read_table

COUNT = 150


def damage(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 30])):
        if not data:
            break
        position, kind = draw.randrange(len(data)), draw.randrange(4)
        if kind == 0:
            data[position] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[position : position + draw.randrange(600)] = bytes(draw.randrange(600))
        elif kind == 2:
            del data[position : position + draw.randrange(600)]
        else:
            data[position : position + 12] = draw.choice([b"\xff" * 12, b"77777777777\0", b"-1".ljust(12, b"\0")])
    return bytes(data)


def check(records):
    found = 0
    for record in records:
        found += 1
        assert found < 1000
        record.id.encode()
        with suppress(ValueError):
            assert isinstance(record.open(), bytes)
    assert found


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives(tmp_path, suffix, kind):
    draw, compression = random.Random(f"{suffix}{kind}"), suffix.removeprefix("tar").removeprefix(".")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{compression}", format=kind) as archive:
        for number in range(6):
            member = tarfile.TarInfo(f"{number}{'long/' * 30 * (number % 2)}é.jpg")
            member.size = 100 * number
            archive.addfile(member, io.BytesIO(draw.randbytes(member.size)))
    path = tmp_path / f"a.{suffix}"
    for _ in range(COUNT):
        path.write_bytes(damage(stream.getvalue(), draw) or b"x")
        check(read_archive(str(path), path.name, frozenset(), False))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_tables(tmp_path, compression):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    draw, stream = random.Random(compression), io.BytesIO()
    table = pa.table({"image": [draw.randbytes(300) for _ in range(20)], "label": range(20)})
    pq.write_table(table, stream, row_group_size=7, compression=compression)
    path = tmp_path / "t.parquet"
    for _ in range(COUNT):
        path.write_bytes(damage(stream.getvalue(), draw) or b"x")
        check(read_table(str(path), path.name, None, False))
