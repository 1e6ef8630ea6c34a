"""Tar archives of images, such as WebDataset's shards: their members, in order, without unpacking."""

import bz2
import gzip
import lzma
import os
import tarfile
from collections.abc import Iterator
from contextlib import closing
from typing import BinaryIO, cast

from qwenvit.datasets.digests import DigestSet
from qwenvit.datasets.record import (
    MAX_MEMBER_BYTES,
    Bytes,
    Content,
    FilePart,
    Record,
    Unusable,
    make_record,
    reason_of,
    stamp_of,
    unicode_name,
)
from qwenvit.preprocess.image_file import SUFFIXES as IMAGE_SUFFIXES

PLAIN_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAX_END_BYTES = 2**20
"""What is read behind the end of a compressed archive: tar fills up its last 10 kB."""
SUFFIXES = (PLAIN_SUFFIX, *COMPRESSED_SUFFIXES)


def read_archive(file: str, name: str, video_suffixes: frozenset[str], verify: bool) -> Iterator[Record]:
    """Yield the images of an archive, which are the members with an image's suffix.

    A plain archive's members are read by whoever opens them. A compressed one has to be read from its start, so that
    its members come with their bytes. Members of one name: the first counts, and the others are `Unusable`. So is what
    a damaged archive has lost, as one record of the archive's own name.

    Args:
        file: the archive.
        name: its id; a member's is `name/member`.
        video_suffixes: suffixes of members that are videos, which are `Unusable` in an archive; empty if no videos are
            wanted.
        verify: make stamps from the members' hashes.
    """
    names, images = DigestSet(), 0
    archive_stamp = "unreadable"
    try:
        archive_stamp = stamp_of(file)
        for member, content in _members(file):
            member_name = unicode_name(member.name.removeprefix("./"))
            base = os.path.basename(member_name)
            suffix = os.path.splitext(base)[1].lower()
            if base.startswith("._") or suffix not in IMAGE_SUFFIXES | video_suffixes:
                continue
            images += 1
            inner, copies = member_name, 1
            while not names.add(inner):
                copies += 1
                inner = f"{member_name}#{copies}"
            if copies > 1:
                content = Unusable(f"the archive has another member called {member_name!r} before this one")
            elif suffix in video_suffixes:
                content = Unusable("videos in archives are not read: unpack the archive")
            stamp = f"{archive_stamp}-{member.offset_data}"
            yield make_record(f"{name}/{inner}", f"{file}/{inner}", stamp, content, verify=verify)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 a damaged archive makes tarfile and zlib raise almost anything
        reason = f"broken archive, of which {images} images were found: {reason_of(error)}"
    else:
        if images:
            return
        reason = f"no images in this archive ({', '.join(sorted(IMAGE_SUFFIXES))})"
    yield make_record(name, file, archive_stamp, Unusable(reason), verify=verify)


class _Blocks:
    """A stream for tarfile that remembers what was read last: tarfile takes any damaged header for the end."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell = stream.seek, stream.tell
        self._read = stream.read
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        """Read as a file does."""
        self.last = self._read(size)
        return self.last


def _open(file: str) -> BinaryIO:
    """Open an archive, decompressing it if its name says so. Each raises an error where its data end too early."""
    name = file.lower()
    if name.endswith(PLAIN_SUFFIX):
        return open(file, "rb")
    if name.endswith(("gz", "tgz")):
        return cast(BinaryIO, gzip.open(file))
    return cast(BinaryIO, bz2.open(file) if name.endswith("bz2") else lzma.open(file))


def _members(file: str) -> Iterator[tuple[tarfile.TarInfo, Content]]:
    """Yield the regular files and links of an archive. What is wrong with it is an error of any type, after them."""
    plain = file.lower().endswith(PLAIN_SUFFIX)
    with _open(file) as stream, closing(_LinkTargets(file, plain)) as targets:
        blocks = _Blocks(stream)
        with tarfile.open(fileobj=cast(BinaryIO, blocks), mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps all that it has seen
                content: Content
                if member.islnk() and _is_image(member):
                    content = targets.content(member)
                elif member.issym():
                    content = Unusable(f"a symbolic link in the archive, to {unicode_name(member.linkname)!r}")
                elif not member.isreg():
                    continue
                elif member.issparse():
                    content = Unusable("a sparse member: write the archive without --sparse")
                elif plain:
                    content = FilePart(file, member.offset_data, member.size)
                else:
                    content = _read_member(archive, member)
                targets.add(member)
                yield member, content
            if blocks.last != bytes(tarfile.BLOCKSIZE):
                is_header = len(blocks.last) == tarfile.BLOCKSIZE
                what = "a damaged header" if is_header else "no end mark, so it may be cut short"
                raise tarfile.ReadError(f"{what} at byte {archive.offset}")
            if not plain:
                stream.read(MAX_END_BYTES)  # an error if the checksum is wrong


class _LinkTargets:
    """Finds what hard links name. Of an archive without such links nothing is remembered."""

    def __init__(self, file: str, plain: bool) -> None:
        self._file, self._plain = file, plain
        self._places: dict[str, tuple[int, int]] | None = None
        self._stream: BinaryIO | None = None

    def add(self, member: tarfile.TarInfo) -> None:
        """Remember where a member is, once there has been a link."""
        if self._places is not None and member.isreg() and not member.issparse():
            self._places[os.path.normpath(member.name)] = member.offset_data, member.size

    def content(self, link: tarfile.TarInfo) -> Content:
        """Return the content of the earlier member that a link names."""
        if self._places is None:
            self._places = {}
            with _open(self._file) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
                while (member := archive.next()) is not None and member.offset < link.offset:
                    archive.members = []  # type: ignore[attr-defined]
                    self.add(member)
        place = self._places.get(os.path.normpath(link.linkname))
        if place is None:
            return Unusable(f"a hard link to {unicode_name(link.linkname)!r}, which is not in the archive before it")
        self._places[os.path.normpath(link.name)] = place
        start, size = place
        if self._plain:
            return FilePart(self._file, start, size)
        if size > MAX_MEMBER_BYTES:
            return Unusable(f"expected a member of at most {MAX_MEMBER_BYTES} bytes, got {size}")
        if self._stream is None:
            self._stream = _open(self._file)
        self._stream.seek(start)  # as long as links are in the order of what they name, nothing is decompressed again
        return Bytes(self._stream.read(size))

    def close(self) -> None:
        """Close what was opened to follow links."""
        if self._stream is not None:
            self._stream.close()


def _is_image(member: tarfile.TarInfo) -> bool:
    return os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Content:
    if not _is_image(member):
        return Unusable("not an image")
    if member.size > MAX_MEMBER_BYTES:
        return Unusable(f"expected a member of at most {MAX_MEMBER_BYTES} bytes, got {member.size}")
    reader = archive.extractfile(member)
    data = b"" if reader is None else reader.read()
    if len(data) < member.size:
        raise tarfile.ReadError(f"cut short in {member.name!r}")
    return Bytes(data)
