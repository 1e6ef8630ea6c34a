"""What a user passes as images or as a video, checked and prepared in threads ahead of the tower."""

import os
from collections.abc import Generator, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

from qwenvit.outputs import VideoTimes
from qwenvit.pipeline import prefetch_on_stream
from qwenvit.preprocess.decode import IMAGE_TYPES, Channels, ImageInput, each_image, snapshot
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.jpeg import Decoder
from qwenvit.preprocess.options import ImageOptions
from qwenvit.preprocess.prefetch import Prefetched, check_num_workers
from qwenvit.preprocess.prepared import Prepared
from qwenvit.preprocess.video_processor import VideoProcessor
from qwenvit.video_input import VideoInput


@dataclass(frozen=True)
class ImageStream:
    """Images that are being prepared."""

    prefetched: Generator[Prefetched[Prepared]]
    """An entry for each image, in order. Close it."""
    total: int | None
    """The number of images; None where that is not known."""

    @classmethod
    def open(
        cls,
        images: ImageInput | Iterable[ImageInput],
        processor: ImageProcessor,
        device: torch.device,
        num_workers: int | None,
        decode: Decoder,
        options: ImageOptions,
    ) -> "ImageStream":
        """Check the arguments, and start; see `Encoder.encode` for arguments and errors."""
        workers = check_num_workers(num_workers)
        prepare = processor.preparer(device, decode, **options)
        total = 1 if isinstance(images, IMAGE_TYPES) else len(images) if isinstance(images, Sized) else None
        if total == 1:
            workers = 0  # there is nothing else to do while it is decoded
        drawn = each_image(images)
        if not isinstance(images, (Sequence, *IMAGE_TYPES)):
            drawn = map(snapshot, drawn)
        return cls(prefetch_on_stream(device, drawn, prepare, workers), total)


@dataclass(frozen=True)
class VideoStream:
    """Pieces of a video that are being prepared: groups of frames do not see one another in the tower."""

    prefetched: Generator[Prefetched[Prepared]]
    """An entry for each piece, in order. Close it."""
    grid: tuple[int, int, int]
    """Frame groups, rows and columns of patches of the whole video."""
    times: VideoTimes | None
    """When the frames are shown; None where that is not known."""

    @classmethod
    def open(
        cls,
        frames: Iterable[ImageInput] | str | os.PathLike[str],
        processor: VideoProcessor,
        device: torch.device,
        *,
        fps: float | None,
        num_frames: int | None,
        frame_times: Sequence[float] | None,
        min_pixels: int | None,
        max_pixels: int | None,
        size: Mapping[str, int] | None,
        channels: Channels,
        cap_pixels_per_frame: bool | None,
        num_workers: int | None,
    ) -> "VideoStream":
        """Check the arguments, and start; see `Encoder.encode_video` for arguments and errors."""
        workers = check_num_workers(num_workers)
        bounded = processor.with_bounds(min_pixels, max_pixels, size)
        sampling: dict[str, Any] = {"fps": fps, "num_frames": num_frames}
        video = VideoInput.open(frames, bounded, **sampling, frame_times=frame_times, channels=channels)
        bounds: dict[str, Any] = {"channels": video.channels, "cap_pixels_per_frame": cap_pixels_per_frame}
        prepare = bounded.preparer(video.frames, device, **bounds)
        return cls(prefetch_on_stream(device, prepare.pieces(), prepare, workers), prepare.grid, video.times)
