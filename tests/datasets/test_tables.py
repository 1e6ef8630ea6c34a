"""Rows of parquet files, against pyarrow's own reading of the whole table."""

import io

import pytest
from PIL import Image

from qwenvit.datasets import tables
from qwenvit.datasets.tables import ColumnError, count_rows, read_table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(shade):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def read(path, column=None, verify=False):
    return list(read_table(str(path), "t.parquet", column, verify))


def outcome(record):
    try:
        return record.open()
    except (OSError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_rows_are_the_tables_own_in_order(tmp_path, kind):
    images = [png(shade) for shade in range(100)]
    path = write(tmp_path / "t.parquet", {"label": range(100), "photo": pa.array(images, kind)}, row_group_size=7)
    records = read(path)
    assert [record.open() for record in records] == images
    assert [record.id for record in records] == [f"t.parquet/{row}" for row in range(100)]
    assert len({record.stamp for record in records}) == 100
    assert count_rows(path, None) == 100


def test_the_struct_of_hugging_face_has_bytes_or_a_path(tmp_path):
    (tmp_path / "there.png").write_bytes(png(1))
    cells = [{"bytes": png(0), "path": "name.png"}, {"bytes": None, "path": "there.png"}, None]
    cells += [{"bytes": None, "path": None}, {"bytes": None, "path": "gone.png"}, {"bytes": b"", "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = write(tmp_path / "t.parquet", {"image": pa.array(cells, kind), "caption": ["a"] * 6})
    outcomes = [outcome(record) for record in read(path)]
    assert outcomes[0] == png(0)
    assert outcomes[1].read_bytes() == png(1)
    assert outcomes[2] == outcomes[3] == "the row has no image"
    assert "'gone.png': No such file" in outcomes[4]
    assert outcomes[5] == b""


def test_what_datasets_writes_is_read(tmp_path):
    pytest.importorskip("datasets.config", reason="needs datasets")  # `datasets` alone is also this folder's name
    import datasets

    pictures = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    whole = datasets.Dataset.from_dict({"image": pictures, "label": range(5)}, features=features)
    whole.to_parquet(str(tmp_path / "t.parquet"))
    records = read(tmp_path / "t.parquet")
    opened = [Image.open(io.BytesIO(record.open())) for record in records]
    assert [image.getpixel((0, 0)) for image in opened] == [(shade, 0, 0) for shade in range(5)]


def test_a_column_of_paths_must_be_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    path = write(tmp_path / "t.parquet", {"file": [str(tmp_path / "a.png"), "a.png", "", None, "no\0name"]})
    assert count_rows(path, None) is None
    assert count_rows(path, "file") == 5
    outcomes = [outcome(record) for record in read(path, "file")]
    assert [one.read_bytes() for one in outcomes[:2]] == [png(1)] * 2
    assert outcomes[2:4] == ["the row has no image"] * 2
    assert "null" in outcomes[4]


def test_of_several_columns_one_is_called_image_or_must_be_named(tmp_path):
    columns = {"mask": [b"mask"], "image": [b"image"], "number": [1]}
    path = write(tmp_path / "t.parquet", columns)
    assert [record.open() for record in read(path)] == [b"image"]
    assert [record.open() for record in read(path, "mask")] == [b"mask"]
    with pytest.raises(ColumnError, match=r"expected bytes, paths or struct<bytes, path> .*'number' of type int64"):
        count_rows(path, "number")
    with pytest.raises(ColumnError, match=r"expected one of mask, image, number \(.*\), got 'picture'"):
        count_rows(path, "picture")
    path = write(tmp_path / "u.parquet", {"mask": [b"mask"], "photo": [b"image"]})
    with pytest.raises(ColumnError, match="expected the name of one of mask, photo"):
        count_rows(path, None)


def test_a_stamp_is_the_files_or_with_verify_the_images(tmp_path):
    path = write(tmp_path / "t.parquet", {"image": [png(0), png(1)]})
    before, hashed = read(path), read(path, verify=True)
    write(tmp_path / "t.parquet", {"image": [png(0), png(2), png(1)]})
    assert {one.stamp for one in before}.isdisjoint(one.stamp for one in read(path))
    now = read(path, verify=True)
    assert [now[0].stamp, now[2].stamp] == [one.stamp for one in hashed]
    assert now[1].stamp not in {one.stamp for one in hashed}


def test_the_stamp_of_a_path_is_that_of_its_file(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    path = write(tmp_path / "t.parquet", {"file": ["a.png"]})
    (before,) = read(path, "file")
    (tmp_path / "a.png").write_bytes(png(1) + b"more")
    (after,) = read(path, "file")
    assert before.stamp != after.stamp


def test_a_broken_table_fails_after_the_rows_that_can_be_read(tmp_path):
    images = [bytes([row]) * 5000 for row in range(64)]
    path = write(tmp_path / "t.parquet", {"image": images}, row_group_size=16, compression="none", use_dictionary=False)
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    page = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[page : page + 40] = b"\xff" * 40
    (tmp_path / "t.parquet").write_bytes(data)
    *rows, failure = read(path)
    assert [row.open() for row in rows] == images[: len(rows)]
    assert len(rows) == 32
    assert failure.id == "t.parquet"
    with pytest.raises(ValueError, match=f"broken table, of which {len(rows)} rows were read"):
        failure.open()


@pytest.mark.parametrize("data", [b"", b"no parquet", b"PAR1" * 10])
def test_what_is_no_table_fails(tmp_path, data):
    (tmp_path / "t.parquet").write_bytes(data)
    (failure,) = read(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="broken table, of which 0 rows were read"):
        failure.open()


def test_a_table_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    monkeypatch.setattr(pa, "parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'qwenvit\[parquet\]'"):
        tables.import_parquet()


def test_a_row_group_of_many_pages_is_not_read_at_once(tmp_path):
    image = bytes(range(256)) * 4096  # 1 MB
    images = [image[row:] + image[:row] for row in range(64)]
    path = write(tmp_path / "t.parquet", {"image": images}, use_dictionary=False, write_batch_size=1)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in read_table(path, "t.parquet", None, False))
    assert most < 40 * 2**20
