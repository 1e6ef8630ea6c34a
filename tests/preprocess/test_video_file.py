"""Video files against the arrays written into them and against PyAV's own conversion."""

import os
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit.preprocess.video_file import VideoFile

av = pytest.importorskip("av", reason='needs PyAV: pip install "av>=15"')

LOSSLESS = {
    ".mkv": ("ffv1", "bgr0"),
    ".mp4": ("libx264rgb", "rgb24"),
    ".avi": ("ffv1", "bgr0"),
    ".mov": ("png", "rgb24"),
}


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Return frames `[count, height, width, 3]` of noise, each with its own number in its first pixel."""
    frames = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = np.arange(count)
    return frames


def write(path: Path, frames: np.ndarray, codec: tuple[str, str] | None = None, rate: int = 30, **options) -> Path:
    """Encode frames, by default without loss; `rate` is in frames per second."""
    name, pixel_format = codec or LOSSLESS[path.suffix]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(name, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if name == "libx264rgb":
            stream.options = {"qp": "0", "bf": "2"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_tone(path: Path, cover: bool = False) -> Path:
    """Write a second of audio, with a cover picture if asked."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=8000)
        picture = container.add_stream("png", rate=1) if cover else None
        if picture:
            picture.height, picture.width, picture.pix_fmt = 16, 16, "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic.value
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pictures(1, 16, 16)[0], format="rgb24")))
        tone = np.sin(np.arange(8000, dtype=np.float32))[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


@pytest.mark.parametrize("suffix", sorted(LOSSLESS))
def test_frames_are_those_written(suffix: str, tmp_path) -> None:
    written = pictures(9, 34, 50)
    video = VideoFile(write(tmp_path / f"clip{suffix}", written, rate=25))
    assert (video.num_frames, video.fps, video.height, video.width) == (9, 25.0, 34, 50)
    for indices in ([*range(9)], [0, 3, 8], [8], [2, 2, 5], np.array([1, 4]), []):
        frames = list(video.frames(indices))
        assert all(frame.dtype == torch.uint8 and frame.is_contiguous() for frame in frames)
        assert [frame[0, 0, 0].item() for frame in frames] == list(indices)
        assert all(torch.equal(frame, torch.from_numpy(written[i])) for frame, i in zip(frames, indices, strict=True))


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("ts", "mpeg2video")])
def test_lossy_frames_are_as_pyav_converts_them(suffix: str, codec: str, tmp_path) -> None:
    path = write(tmp_path / f"clip.{suffix}", pictures(20, 48, 66), (codec, "yuv420p"))
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video = VideoFile(str(path))
    assert video.num_frames == len(expected) == 20
    assert all(torch.equal(frame, torch.from_numpy(expected[i])) for i, frame in enumerate(video.frames(range(20))))


def test_names_are_no_protocols_or_patterns(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mkv", "50%02d.mkv", "Ünïcode name.mkv"):
        write(tmp_path / "clip.mkv", pictures(2, 16, 16)).rename(tmp_path / name)
        assert VideoFile(name).num_frames == 2


def test_the_rate_of_a_stream_of_variable_rate_is_its_average(tmp_path) -> None:
    """Ten frames at 0, 1, 2, ..., 4, 14, 24, ... fiftieths of a second."""
    times = [0, 1, 2, 3, 4, 14, 24, 34, 44, 54]
    with av.open(str(tmp_path / "clip.mov"), "w") as container:
        stream = container.add_stream("png", rate=50)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "rgb24"
        for picture, time in zip(pictures(10, 16, 16), times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 50)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = VideoFile(tmp_path / "clip.mov")
    assert [frame[0, 0, 0].item() for frame in video.frames(range(video.num_frames))] == [*range(10)]
    assert video.fps == pytest.approx(10 / (64 / 50), rel=0.2)


# What each display matrix of ISO/IEC 14496-12 (a, b, c, d) makes of a picture.
TURNS = {
    (1, 0, 0, 1): lambda picture: picture,
    (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),  # a phone held upright: a quarter turn clockwise
    (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
    (0, -1, 1, 0): lambda picture: np.rot90(picture, 1),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda picture: picture.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda picture: np.rot90(picture.transpose(1, 0, 2), 2),
}


@pytest.mark.parametrize("matrix", sorted(TURNS))
def test_frames_are_turned_as_shown(matrix: tuple, tmp_path) -> None:
    written = pictures(3, 18, 40)
    path = write(tmp_path / "clip.mov", written)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # the matrix: nine big-endian numbers, the first two columns in 16.16 bits
    a, b, c, d = (value * 65536 for value in matrix)
    identity = np.array([65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30], ">i4")
    assert data[start : start + 36] == identity.tobytes()
    data[start : start + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)
    expected = [TURNS[matrix](picture) for picture in written]
    video = VideoFile(path)
    assert (video.height, video.width) == expected[0].shape[:2]
    for frame, picture in zip(video.frames(range(3)), expected, strict=True):
        assert frame.is_contiguous()
        assert torch.equal(frame, torch.from_numpy(picture.copy()))


def test_files_without_usable_video(tmp_path) -> None:
    whole = write(tmp_path / "whole.mp4", pictures(3, 16, 16), movflags="faststart").read_bytes()
    index = whole[: whole.index(b"mdat") + 4]  # without the frames
    files = {
        "empty.mp4": (b"", "broken video file"),
        "junk.mp4": (b"junk" * 1000, "broken video file"),
        "tone.m4a": (write_tone(tmp_path / "tone.mp4").read_bytes(), "expected a video stream, got none"),
        "cover.m4a": (write_tone(tmp_path / "cover.mp4", cover=True).read_bytes(), "expected a video stream, got none"),
        "index.mp4": (index, "expected a video with frames, got none"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            VideoFile(tmp_path / name)


def test_errors_of_the_file_system_are_pythons_own(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        VideoFile(tmp_path / "none.mp4")
    assert caught.value.filename == str(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match=r"path: expected a path, got the URL 'http://host/clip\.mp4'"):
        VideoFile("http://host/clip.mp4")
    with pytest.raises(TypeError, match="path: expected a path, got bytes"):
        VideoFile(b"clip.mp4")


@pytest.mark.parametrize("kind", ["named pipe", "device", "folder"])
def test_a_path_of_something_else_is_refused_at_once(kind: str, tmp_path) -> None:
    path = {"device": Path("/dev/zero"), "folder": tmp_path}.get(kind, tmp_path / "clip.mp4")
    if kind == "named pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: expected a regular file, got a {kind}"):
        VideoFile(path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.m3u8", "clip.txt"])
@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile {name}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\n{path}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\nfile://{path}\n#EXT-X-ENDLIST\n",
    ],
    ids=["concat", "hls", "hls-url"],
)
def test_a_playlist_opens_no_other_file(playlist: str, name: str, tmp_path) -> None:
    clip = write(tmp_path / "other.ts", pictures(12, 32, 32), ("mpeg2video", "yuv420p"))
    assert VideoFile(clip).num_frames == 12
    (tmp_path / name).write_text(playlist.format(name=clip.name, path=clip))
    with pytest.raises(ValueError, match=rf"{name}: broken video file"):
        VideoFile(tmp_path / name)


def test_names_of_several_files_are_taken_as_they_are(tmp_path) -> None:
    for index in range(3):
        write(tmp_path / f"img{index}.avi", pictures(1, 16, 16))
    with pytest.raises(FileNotFoundError):
        VideoFile(tmp_path / "img%d.avi")


def test_frames_have_the_limit_of_images(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "clip.mkv", pictures(2, 20, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(ValueError, match=r"clip\.mkv: expected frames of at most 599 pixels .*got 30 x 20"):
        VideoFile(path)
    for limit in (600, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert VideoFile(path).num_frames == 2


def test_an_mp4_that_is_cut_short_is_refused(tmp_path) -> None:
    path = write(tmp_path / "clip.mp4", pictures(12, 32, 32), movflags="faststart")  # the index comes first
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(ValueError, match=r"clip\.mp4: expected 12 frames, but the file is cut short after \d+"):
        VideoFile(path)


def test_a_matroska_that_is_cut_short_has_the_frames_it_has(tmp_path) -> None:
    path = write(tmp_path / "clip.mkv", pictures(12, 32, 32))
    whole = VideoFile(path)
    path.write_bytes(path.read_bytes()[:-9000])
    cut = VideoFile(path)
    assert 0 < cut.num_frames < 12
    assert len(list(cut.frames(range(cut.num_frames)))) == cut.num_frames
    assert len(list(whole.frames([0]))) == 1
    with pytest.raises(ValueError, match=rf"clip\.mkv: expected 12 frames, but the file ends after {cut.num_frames}"):
        list(whole.frames([0, 11]))


def test_a_file_that_is_damaged_inside_is_named(tmp_path) -> None:
    path = write(tmp_path / "clip.mov", pictures(12, 32, 32))
    data = bytearray(path.read_bytes())
    start = data.rindex(b"\x89PNG")  # the last frame
    data[start : start + 1500] = bytes(1500)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"clip\.mov: (broken video file|expected 12 frames)"):  # FFmpeg 7, 8
        list(VideoFile(path).frames([11]))


def test_frames_that_change_their_size_are_refused(tmp_path) -> None:
    files = [tmp_path / f"{height}.h264" for height in (32, 48)]
    for file, height in zip(files, (32, 48), strict=True):
        write(file, pictures(3, height, 32), LOSSLESS[".mp4"])
    path = tmp_path / "clip.h264"
    path.write_bytes(b"".join(file.read_bytes() for file in files))
    video = VideoFile(path)
    assert (video.num_frames, len(list(video.frames([0, 2])))) == (6, 2)
    with pytest.raises(ValueError, match=r"clip\.h264: expected frame 4 of .* size, 32 x 32, got 48 x 32"):
        list(video.frames([0, 4]))


def test_a_file_without_a_frame_rate_is_refused(tmp_path) -> None:
    path = write(tmp_path / "clip.mkv", pictures(1, 32, 32))
    data = path.read_bytes()
    start = data.index(b"\x23\xe3\x83\x84")  # DefaultDuration, of four bytes
    path.write_bytes(data[:start] + b"\xec\x86" + bytes(6) + data[start + 8 :])  # Void, of six
    with pytest.raises(ValueError, match=r"clip\.mkv: expected a video with a frame rate, got none"):
        VideoFile(path)


def test_frames_that_an_edit_list_cuts_off_are_not_counted(tmp_path) -> None:
    written = pictures(12, 32, 32)
    path = write(tmp_path / "clip.mp4", written)
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 12  # one edit: its duration in milliseconds, its start in units of 1/15360 s
    assert data[start : start + 8] == np.array([400, 0], ">i4").tobytes()
    data[start : start + 8] = np.array([300, 3 * 512], ">i4").tobytes()
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 12
    video = VideoFile(path)
    assert video.num_frames == 9
    for frame, picture in zip(video.frames(range(9)), written[3:], strict=True):
        assert torch.equal(frame, torch.from_numpy(picture))


def test_titles_may_be_in_any_encoding(tmp_path) -> None:
    path = write(tmp_path / "clip.mkv", pictures(2, 16, 16))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"Lavf", b"L\xe9vf"))  # the writing application's name, in Latin-1
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert VideoFile(path).num_frames == 2


@pytest.mark.parametrize("indices", [[3, 1], [-1, 2], [0, 5]])
def test_indices_are_checked_before_anything_is_decoded(indices: list, tmp_path) -> None:
    video = VideoFile(write(tmp_path / "clip.mkv", pictures(5, 16, 16)))
    with pytest.raises(ValueError, match=r"^indices: expected"):
        video.frames(indices)


def test_decoding_stops_at_the_last_index_and_closes_the_file(tmp_path, monkeypatch) -> None:
    video = VideoFile(write(tmp_path / "clip.mkv", pictures(40, 16, 16)))
    opened = []
    original = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(original(*args, **options)) or opened[-1])
    frames = video.frames([0, 1, 39])
    assert not opened
    next(frames)
    frames.close()
    assert len(opened) == 1
    with pytest.raises(AssertionError, match="not open"):
        next(opened[0].decode(video=0))


def test_pyav_is_named_where_it_is_missing(tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "clip.mkv", pictures(2, 16, 16))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install .av>=15."):
        VideoFile(path)
