"""From what a user names to records: each input once, in a fixed order, with ids that stay and stamps that tell."""

import io
import os
import pickle
import sys
import tarfile
import tracemalloc
import types
import warnings

import pytest
from PIL import Image

from qwenvit.datasets import digests
from qwenvit.datasets.find import find_records


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "trip/c.webp", "trip/d.tiff"):
        (folder / name).write_bytes(name.encode())
    return folder


def tar(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 100
            archive.addfile(member, io.BytesIO(name.encode().ljust(100)))
    return path


def ids(*inputs, **options):
    return [record.id for record in find_records(inputs, **options)]


def read(record):
    source = record.open()
    return source if isinstance(source, bytes) else source.read_bytes()


def standard_input(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))


def test_a_folders_images_in_order_and_again(photos):
    records = find_records([photos])
    expected = ["a.JPG", "b.png", "trip/c.webp", "trip/d.tiff"]
    for _ in range(2):
        found = list(records)
        assert [record.id for record in found] == expected
        assert [read(record) for record in found] == [name.encode() for name in expected]
        assert [record.path for record in found] == [str(photos / name) for name in expected]
        assert pickle.loads(pickle.dumps(found)) == found
    assert records.expected == 4
    assert not records.has_archives


def test_other_files_are_counted_in_a_warning(photos):
    for name in ("notes.txt", "trip/README", "._b.png", "clip.mp4"):
        (photos / name).touch()
    with pytest.warns(UserWarning, match="photos: 3 other files skipped"):
        assert len(ids(photos)) == 4


def test_a_named_file_is_taken_whatever_its_suffix(photos):
    (photos / "notes.txt").write_text("text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(photos / "notes.txt", photos / "trip" / "c.webp") == ["notes.txt", "c.webp"]


def test_archives_and_tables_in_a_folder_count(photos):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    tar(photos / "s.tar", ["x.jpg", "y.jpg"])
    parquet.write_table(table({"image": [b"1", b"2", b"3"]}), photos / "t.parquet")
    parquet.write_table(table({"caption": ["no image"]}), photos / "metadata.parquet")
    with pytest.warns(UserWarning, match="1 other files skipped"):
        records = find_records([photos])
    expected = ["a.JPG", "b.png", "s.tar/x.jpg", "s.tar/y.jpg", "t.parquet/0", "t.parquet/1", "t.parquet/2"]
    assert [record.id for record in records] == [*expected, "trip/c.webp", "trip/d.tiff"]
    assert records.expected == 9
    with pytest.raises(ValueError, match="no column of encoded images in this table"):
        find_records([photos / "metadata.parquet"])


def test_the_number_of_records_is_estimated_from_what_was_read_of_archives(photos):
    for number in range(4):
        tar(photos / f"{number}.tar", [f"{inner:04}.jpg" for inner in range(500)])
    records = find_records([photos])
    assert records.expected is None
    estimates = [records.expected for _ in records]
    assert len(estimates) == 2004
    assert all(abs(estimate - 2004) < 150 for estimate in estimates[100:])
    assert records.expected == 2004


def test_a_pattern(photos):
    assert ids(f"{photos}/*") == ["a.JPG", "b.png", "trip/c.webp", "trip/d.tiff"]
    assert ids(f"{photos}/**/*.tiff", f"{photos}/b*") == ["trip/d.tiff", "b.png"]
    (photos / "[1].png").touch()
    assert ids(photos / "[1].png") == ["[1].png"]
    with pytest.raises(ValueError, match=r"no images match this pattern"):
        find_records([f"{photos}/*.gif"])


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
@pytest.mark.parametrize("last", [True, False])
def test_a_list_on_standard_input(photos, monkeypatch, separator, last):
    tar(photos.parent / "s.tar", ["x.jpg"])
    monkeypatch.chdir(photos.parent)
    lines = [b"./photos/b.png", b"photos/trip", b"", b"s.tar", b"photos/gone.png", b"photos/a.JPG"]
    standard_input(monkeypatch, separator.join(lines) + separator * last)
    records = find_records(["-"])
    for _ in range(2):
        found = {record.id: record for record in records}
        expected = ["photos/b.png", "photos/trip/c.webp", "photos/trip/d.tiff", "s.tar/x.jpg", "photos/gone.png"]
        assert list(found) == [*expected, "photos/a.JPG"]
        assert read(found["photos/trip/d.tiff"]) == b"trip/d.tiff"
        with pytest.raises(ValueError, match="no such file or folder"):
            found["photos/gone.png"].open()


def test_a_long_list_is_cut_at_newlines_alone(tmp_path, monkeypatch):
    """Blocks are read from a file: a line may span two, and a name may have any other character."""
    lines = [f"{number}{'x' * (number % 300)}\u2028\x0b\x85.png" for number in range(2000)]
    standard_input(monkeypatch, "\n".join(lines).encode())
    assert ids("-") == lines


def test_names_with_newlines_in_a_list_separated_by_null_bytes(tmp_path, monkeypatch):
    (tmp_path / "new\nline.png").touch()
    monkeypatch.chdir(tmp_path)
    standard_input(monkeypatch, b"new\nline.png\0")
    (record,) = find_records(["-"])
    assert (record.id, record.open().name) == ("new\nline.png", "new\nline.png")


def test_names_that_are_no_unicode_are_escaped(photos):
    name = os.fsdecode(b"\xff\xfe.png")
    (photos / name).write_bytes(b"bytes")
    record = list(find_records([photos]))[-1 if name > "trip" else 0]
    assert record.id == r"\xff\xfe.png"
    assert record.path == rf"{photos}/\xff\xfe.png"
    assert read(pickle.loads(pickle.dumps(record))) == b"bytes"


@pytest.mark.parametrize("inputs", [["photos/a.JPG", "photos/a.JPG"], ["photos", "photos/b.png"], ["photos", "photos"]])
def test_two_inputs_of_one_id_are_refused(photos, monkeypatch, inputs):
    monkeypatch.chdir(photos.parent)
    with pytest.raises(ValueError, match="same name would overwrite each other"):
        find_records(inputs)
    standard_input(monkeypatch, b"photos/a.JPG\n./photos/a.JPG\n")
    with pytest.raises(ValueError, match=r"same name would overwrite each other: photos/a\.JPG"):
        find_records(["-"])


def test_what_cannot_be_an_input(photos, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        find_records([tmp_path / "gone"])
    with pytest.raises(ValueError, match="empty: no images in this folder"):
        find_records([photos, tmp_path / "empty"])
    with pytest.raises(ValueError, match="expected at least one"):
        find_records([])
    with pytest.raises(ValueError, match="output: expected another folder than the input"):
        find_records([photos], exclude=photos)
    standard_input(monkeypatch, b"\n")
    with pytest.raises(ValueError, match="standard input: no images in this list"):
        find_records(["-"])


def test_the_output_inside_an_input_is_not_searched(photos):
    (photos / "out").mkdir()
    (photos / "out" / "e.png").touch()
    assert ids(photos, exclude=photos / "out") == ["a.JPG", "b.png", "trip/c.webp", "trip/d.tiff"]
    assert len(ids(photos, exclude=photos / "not yet there")) == 5


def test_videos_only_if_they_are_wanted(photos, monkeypatch):
    (photos / "clip.MP4").touch()
    with pytest.raises(ValueError, match=r"clip\.MP4: a video; pass video=True \(--video\)"):
        find_records([photos / "clip.MP4"])
    found = list(find_records([photos], video=True))
    assert [(record.id, record.is_video) for record in found[:3]] == [
        ("a.JPG", False),
        ("b.png", False),
        ("clip.MP4", True),
    ]
    standard_input(monkeypatch, os.fsencode(photos / "clip.MP4"))
    (record,) = find_records(["-"])
    with pytest.raises(ValueError, match="a video"):
        record.open()


def test_what_is_there_and_cannot_be_opened_fails_in_its_turn(photos):
    (photos / "gone.png").symlink_to(photos / "nowhere")
    (photos / "trip" / "gone folder").symlink_to(photos / "nowhere")
    records = {record.id: record for record in find_records([photos])}
    assert len(records) == 6
    for name in ("gone.png", "trip/gone folder"):
        with pytest.raises(ValueError, match="a link to a file or folder that is not there"):
            records[name].open()


def test_a_file_that_goes_away_between_the_passes_fails(photos):
    records = iter(find_records([photos / "a.JPG", photos / "b.png"]))
    next(records)
    (photos / "b.png").unlink()
    with pytest.raises(FileNotFoundError):
        list(records)
    names = find_records([photos])
    (photos / "trip" / "c.webp").unlink()
    assert [record.id for record in names] == ["a.JPG", "trip/d.tiff"]


def test_stamps_tell_size_and_time_or_with_verify_the_content(photos):
    def stamps(**options):
        return {record.id: record.stamp for record in find_records([photos], **options)}

    before, hashed = stamps(), stamps(verify=True)
    os.utime(photos / "b.png", ns=(1, 1))
    assert {name for name, stamp in stamps().items() if stamp != before[name]} == {"b.png"}
    assert stamps(verify=True) == hashed
    status = (photos / "a.JPG").stat()
    (photos / "a.JPG").write_bytes(b"A.jpg")
    os.utime(photos / "a.JPG", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert stamps()["a.JPG"] == before["a.JPG"]  # which is why there is verify
    assert {name for name, stamp in stamps(verify=True).items() if stamp != hashed[name]} == {"a.JPG"}


def test_a_named_pipe_does_not_block(photos):
    os.mkfifo(photos / "pipe.png")
    record = next(record for record in find_records([photos], verify=True) if record.id == "pipe.png")
    with pytest.raises(ValueError, match="expected a regular file, got a named pipe"):
        record.open()


def test_memory_for_many_files_is_that_of_a_folders_names(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "MAX_RECENT", 1000)
    for folder in range(5):
        (tmp_path / str(folder)).mkdir()
        for number in range(3000):
            (tmp_path / str(folder) / f"{number:06}.jpg").touch()
    tracemalloc.start()
    records = find_records([tmp_path])
    assert sum(1 for _ in records) == 15_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3000 * 150 + 15_000 * 3 * 8


def test_pictures_are_opened_from_wherever_they_are(tmp_path):
    """Whatever a record opens, Pillow opens: a path, or bytes."""
    Image.new("RGB", (5, 7)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "inner/a.png")
    records = list(find_records([tmp_path / "a.png", tmp_path / "s.tar"]))
    assert [read(record) for record in records] == [data, data]
