"""Video files: their length, frame rate and size, and chosen frames as RGB."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qwenvit.weights.regular_file import open_regular

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream


class VideoFile:
    """The first video stream of a file, decoded by FFmpeg through PyAV.

    PyAV is the only decoder, so that a video has the same pixels on every machine: its wheels contain FFmpeg.
    torchcodec uses the system's, and FFmpeg 5 and 8 differ in videos of odd height. Each pass over the frames opens the
    file anew and closes it at its end, so a `VideoFile` holds nothing open.

    Attributes:
        path: the file.
        num_frames: frames in the stream, counted. The container's own number is taken where it has as many
            packets; otherwise, as in Matroska and WebM, which state none, the stream is decoded once to count them.
        fps: average frames per second, as FFmpeg states it. Frames of a stream of variable rate are numbered in the
            order in which they are shown, whatever their times.
        height: height of a frame as shown, in pixels: after the rotation that the file states. Pixels that are not
            square are not stretched.
        width: width of a frame as shown, in pixels.

    Raises:
        ImportError: PyAV is not installed.
        TypeError: not a path.
        ValueError: a URL; a path of something else than a file; a file that is broken, or without a video stream,
            frames or a frame rate; a playlist of other files; frames larger than `PIL.Image.MAX_IMAGE_PIXELS`.
        OSError: a file that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path: expected a path, got {type(path).__name__}")
        if isinstance(path, str) and "://" in path:
            raise ValueError(f"path: expected a path, got the URL {path[:80]!r}; download it and pass the file's path")
        self.path = os.fspath(path)
        with self._open() as (container, stream):
            rate = stream.average_rate
            first = next(container.decode(stream), None)
            if first is None:
                raise ValueError(f"{self.path}: expected a video with frames, got none")
            self.height, self.width = _to_rgb(first).shape[:2]
        if not rate:
            raise ValueError(f"{self.path}: expected a video with a frame rate, got none")
        self.fps = float(rate)
        self.num_frames = self._count()

    def frames(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield frames in one forward pass, holding one at a time.

        Args:
            indices: ascending indices below `num_frames`; an index that occurs twice yields its frame twice.

        Yields:
            `[height, width, 3]` uint8 RGB on the CPU, equal to PyAV's `to_ndarray(format="rgb24")`, rotated as shown.

        Raises:
            ValueError: indices that are not ascending or not in the video; a file that is broken, ends early, or
                changes the size of its frames.
            OSError: a file that cannot be read.
        """
        wanted = list(indices)
        if wanted != sorted(wanted):
            raise ValueError("indices: expected ascending indices, got some that descend")
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.num_frames:
            raise ValueError(
                f"indices: expected 0 to {self.num_frames - 1} ({self.path}), got {wanted[0]} to {wanted[-1]}"
            )
        return self._decode(wanted)

    def _decode(self, wanted: list[int]) -> Iterator[Tensor]:
        if not wanted:
            return
        position, index = 0, -1
        with self._open() as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                if index < wanted[position]:
                    continue
                rgb = _to_rgb(frame)
                if rgb.shape[:2] != (self.height, self.width):
                    sizes = f"{self.height} x {self.width}, got {rgb.shape[0]} x {rgb.shape[1]}"
                    raise ValueError(f"{self.path}: expected frame {index} of the first frame's size, {sizes}")
                while index == wanted[position]:
                    yield torch.from_numpy(rgb)
                    position += 1
                    if position == len(wanted):
                        return
        raise ValueError(f"{self.path}: expected {self.num_frames} frames, but the file ends after {index + 1}")

    def _count(self) -> int:
        """Return the number of frames that the stream decodes to."""
        with self._open() as (container, stream):
            stated = stream.frames
            packets = [(packet.is_corrupt, packet.is_discard) for packet in container.demux(stream) if packet.size]
        if stated and any(is_corrupt for is_corrupt, _ in packets):  # a partial packet, or less likely a damaged one
            raise ValueError(f"{self.path}: expected {stated} frames, but the file is cut short after {len(packets)}")
        if stated == sum(not is_discard for _, is_discard in packets):
            return stated
        with self._open() as (container, stream):
            return sum(1 for _ in container.decode(stream))

    @contextmanager
    def _open(self) -> "Iterator[tuple[InputContainer, VideoStream]]":
        """Open the file at its start, and name it in the errors of FFmpeg."""
        av = _import_av()
        with open_regular(Path(self.path)) as file:
            try:
                # FFmpeg may read this file and nothing else: a playlist would name other files. Titles may be in any
                # encoding.
                stream, options = _FileForFFmpeg(file, self.path), {"protocol_whitelist": ""}
                with av.open(stream, metadata_errors="replace", options=options) as container:
                    yield container, _video_stream(container, self.path)
            except av.FFmpegError as error:
                raise ValueError(f"{self.path}: broken video file ({error.strerror})") from error


class _FileForFFmpeg:
    """An open file with its name, by which FFmpeg guesses formats that have no signature."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name, self.read, self.tell = name, file.read, file.tell
        self._seek = file.seek

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek; return an error of the system as FFmpeg's own files do, so that FFmpeg decides what it means."""
        try:
            return self._seek(offset, whence)
        except OSError as error:
            return -(error.errno or errno.EIO)


@dataclass(frozen=True)
class Clip:
    """Chosen frames of a video file, decoded whenever they are iterated."""

    video: VideoFile
    indices: Sequence[int]
    """Ascending indices below the file's `num_frames`."""

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Tensor]:
        return self.video.frames(self.indices)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('video files need PyAV: pip install "av>=15"') from error
    return av


def _video_stream(container: "InputContainer", path: str) -> "VideoStream":
    """Return the first video stream that is no cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & type(stream.disposition).attached_pic:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and stream.width * stream.height > limit:
                raise ValueError(
                    f"{path}: expected frames of at most {limit} pixels (PIL.Image.MAX_IMAGE_PIXELS), got "
                    f"{stream.width} x {stream.height}"
                )
            stream.thread_type = "AUTO"
            return stream
    raise ValueError(f"{path}: expected a video stream, got none")


def _to_rgb(frame: "av.VideoFrame") -> NDArray[np.uint8]:
    """Return a frame as `[H, W, 3]` RGB, turned as its display matrix says.

    The matrix (ISO/IEC 14496-12, `tkhd`) is `[[a, b, u], [c, d, v], [x, y, w]]` and takes the row `(p, q, 1)` of a
    pixel's column and row to where it is shown. Rotations by quarter turns and mirror images are followed; another
    angle is taken for the nearest of these.
    """
    rgb: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32)
        if abs(b) > abs(a):
            rgb, a, d = rgb.transpose(1, 0, 2), c, b
        rgb = rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(rgb)  # FFmpeg pads rows
