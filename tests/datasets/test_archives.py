"""Members of tar archives: what tarfile unpacks, and archives that are damaged in every way we could think of."""

import io
import pickle
import tarfile
import tracemalloc

import pytest

from qwenvit.datasets.archives import read_archive
from qwenvit.datasets.find import VIDEO_SUFFIXES
from qwenvit.datasets.record import MAX_MEMBER_BYTES, FilePart

CONTENTS = {"000.jpg": b"first" * 200, "000.json": b"{}", "b/001.PNG": b"second", "002.webp": b"", "._003.jpg": b"x"}
IMAGES = {"000.jpg": b"first" * 200, "b/001.PNG": b"second", "002.webp": b""}


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write(path, contents, mode="w", **options):
    items = contents.items() if isinstance(contents, dict) else contents
    with tarfile.open(path, mode, **options) as archive:
        for name, data in items:
            add(archive, name, data)
    return path


def read(path, video=frozenset(), verify=False):
    return list(read_archive(str(path), path.name, video, verify))


def contents(records, name):
    return {record.id.removeprefix(f"{name}/"): record.open() for record in records}


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_what_was_put_in(tmp_path, suffix, kind):
    long = {"d/" * 90 + "long name of an image.jpg": b"long"} if kind != tarfile.USTAR_FORMAT else {}
    compression = {"tgz": "gz", "tar": ""}.get(suffix, suffix.removeprefix("tar."))
    path = write(tmp_path / f"a.{suffix}", CONTENTS | long, f"w:{compression}", format=kind)
    records = read(path)
    assert contents(records, path.name) == IMAGES | long
    assert len({record.stamp for record in records}) == len(records)
    assert [pickle.loads(pickle.dumps(record)) for record in records] == records
    assert [record.path for record in records] == [f"{path}/{name}" for name in IMAGES | long]
    assert all(isinstance(record.content, FilePart) == (suffix == "tar") for record in records)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_hard_links_have_what_they_name_and_other_links_fail(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with tarfile.open(path, "w:" + suffix.removeprefix("tar").removeprefix(".")) as archive:
        add(archive, "./a.jpg", b"a")
        add(archive, "b.jpg", b"bb")
        for name, kind, target in (
            ("hard b.jpg", tarfile.LNKTYPE, "b.jpg"),
            ("hard a.jpg", tarfile.LNKTYPE, "a.jpg"),
            ("of a link.jpg", tarfile.LNKTYPE, "hard b.jpg"),
            ("too early.jpg", tarfile.LNKTYPE, "later.jpg"),
            ("symbolic.jpg", tarfile.SYMTYPE, "a.jpg"),
            ("folder.jpg", tarfile.DIRTYPE, ""),
            ("hard.txt", tarfile.LNKTYPE, "a.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        add(archive, "later.jpg", b"later")
        member = tarfile.TarInfo("hard later.jpg")
        member.type, member.linkname = tarfile.LNKTYPE, "later.jpg"
        archive.addfile(member)
    records = {record.id.removeprefix(f"{path.name}/"): record for record in read(path)}
    assert len({record.stamp for record in records.values()}) == len(records)
    with pytest.raises(ValueError, match=r"hard link to 'later\.jpg', which is not in the archive before it"):
        records.pop("too early.jpg").open()
    with pytest.raises(ValueError, match=r"symbolic link in the archive, to 'a\.jpg'"):
        records.pop("symbolic.jpg").open()
    assert {name: record.open() for name, record in records.items()} == {
        "a.jpg": b"a",
        "b.jpg": b"bb",
        "hard b.jpg": b"bb",
        "hard a.jpg": b"a",
        "of a link.jpg": b"bb",
        "later.jpg": b"later",
        "hard later.jpg": b"later",
    }


def test_names_of_any_kind(tmp_path):
    names = ["new\nline.jpg", "esc\x1b[31m.png", "日本.jpg", "/etc/absolute.jpg", "../../up.jpg", "b\udcff.jpg"]
    path = write(tmp_path / "a.tar", {name: name.encode("utf-8", "surrogateescape") for name in names})
    records = read(path)
    assert [record.id for record in records] == [f"a.tar/{name}" for name in [*names[:-1], "b\\xff.jpg"]]
    assert [record.open() for record in records] == [name.encode("utf-8", "surrogateescape") for name in names]


def test_the_second_member_of_a_name_fails_with_an_id_of_its_own(tmp_path):
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.jpg", b"4")])
    records = read(path)
    assert [record.id for record in records] == [f"a.tar/{name}" for name in ("a.jpg", "b.jpg", "a.jpg#2", "a.jpg#3")]
    assert [record.open() for record in records[:2]] == [b"1", b"2"]
    for record in records[2:]:
        with pytest.raises(ValueError, match=r"another member called 'a\.jpg'"):
            record.open()


def test_videos_in_archives_fail_if_they_are_wanted(tmp_path):
    path = write(tmp_path / "a.tar", {"a.jpg": b"1", "b.mp4": b"2"})
    assert contents(read(path), "a.tar") == {"a.jpg": b"1"}
    _, video = read(path, VIDEO_SUFFIXES)
    with pytest.raises(ValueError, match="videos in archives are not read"):
        video.open()


def test_stamps_differ_if_the_archive_or_with_verify_the_member_does(tmp_path):
    path = write(tmp_path / "a.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    before, hashed = read(path), read(path, verify=True)
    assert read(path) == before
    write(path, {"a.jpg": b"1", "b.jpg": b"X", "c.jpg": b"2"})
    assert {record.stamp for record in read(path)}.isdisjoint(record.stamp for record in before)
    now = read(path, verify=True)
    assert (
        now[0].stamp
        == hashed[0].stamp
        == "sha256:" + "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    )
    assert now[1].stamp != hashed[1].stamp
    assert now[2].stamp == hashed[1].stamp


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_an_archive_cut_anywhere_loses_nothing_silently(tmp_path, suffix):
    names = {f"{number}.jpg": bytes([number]) * 700 for number in range(4)}
    whole = write(tmp_path / "whole", names, "w:" + suffix.removeprefix("tar").removeprefix(".")).read_bytes()
    path = tmp_path / f"a.{suffix}"
    end = 4 * (512 + 1024) if suffix == "tar" else len(whole) - 1
    for length in range(0, end, max(end // 40, 1)):
        path.write_bytes(whole[:length])
        records, failed = read(path), 0
        for record in records:
            try:
                assert record.open() == names[record.id.removeprefix(f"a.{suffix}/")]
            except ValueError:
                failed += 1
        assert failed, length
        assert records[-1].id == f"a.{suffix}"


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write(tmp_path / "a.tar", {f"{number}.jpg": b"x" for number in range(4)})
    data = bytearray(path.read_bytes())
    data[2 * 1024] ^= 0xFF
    path.write_bytes(data)
    *found, failure = read(path)
    assert [record.id for record in found] == ["a.tar/0.jpg", "a.tar/1.jpg"]
    with pytest.raises(
        ValueError, match=r"broken archive, of which 2 images were found: a damaged header at byte 2048"
    ):
        failure.open()


@pytest.mark.parametrize("data", [b"", b"no archive", bytes(512), b"\x1f\x8b broken"])
def test_what_is_no_archive_fails(tmp_path, data):
    for name in ("a.tar", "a.tar.gz"):
        (tmp_path / name).write_bytes(data)
        (failure,) = read(tmp_path / name)
        assert failure.id == name
        with pytest.raises(ValueError, match="archive"):
            failure.open()


def test_a_missing_archive_and_one_without_images_fail(tmp_path):
    (failure,) = read(tmp_path / "gone.tar")
    with pytest.raises(ValueError, match=r"broken archive.*No such file"):
        failure.open()
    (failure,) = read(write(tmp_path / "a.tar", {"a.txt": b"text"}))
    with pytest.raises(ValueError, match=r"no images in this archive \(\.avif"):
        failure.open()


def test_a_member_that_is_too_large_fails_without_being_read(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("huge.jpg")
        member.size = MAX_MEMBER_BYTES + 1
        archive.addfile(member)
        archive.fileobj.seek(member.size + 512 - (member.size % 512), io.SEEK_CUR)  # a hole
        archive.offset = archive.fileobj.tell()
        add(archive, "small.jpg", b"x")
    huge, small = read(path)
    assert small.open() == b"x"
    with pytest.raises(ValueError, match="expected a member of at most"):
        huge.open()


def test_an_archive_of_many_members_takes_no_memory(tmp_path):
    path = write(tmp_path / "a.tar", ((f"{number:06}.jpg", b"") for number in range(5000)))
    records = read_archive(str(path), "a.tar", frozenset(), False)
    next(records)
    tracemalloc.start()
    assert sum(1 for _ in records) == 4999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000  # tarfile keeps 5,000 members in 6 MB
