"""What a video can be passed as, a file or frames, as frames to encode and their times."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwenvit.outputs import VideoTimes
from qwenvit.preprocess.decode import Channels, ImageInput
from qwenvit.preprocess.video_file import Clip, VideoFile
from qwenvit.preprocess.video_frames import sized_frames
from qwenvit.preprocess.video_processor import VideoProcessor


@dataclass(frozen=True)
class VideoInput:
    """The frames to encode of one video."""

    frames: Iterable[ImageInput]
    channels: Channels
    times: VideoTimes | None
    """When the frames are shown; None where that is not known."""

    @classmethod
    def open(
        cls,
        frames: Iterable[ImageInput] | str | os.PathLike[str],
        processor: VideoProcessor,
        *,
        fps: float | None,
        num_frames: int | None,
        frame_times: Sequence[float] | None,
        channels: Channels,
    ) -> "VideoInput":
        """Sample a video file, or take frames as they are; see `Encoder.encode_video` for arguments and errors."""
        group = processor.temporal_patch_size
        if isinstance(frames, str | os.PathLike):
            if channels is not None:
                raise ValueError(f"channels: expected None with a video file, got {channels!r}")
            if frame_times is not None:
                raise ValueError("frame_times: expected None with a video file, whose times are known")
            video = VideoFile(frames)
            indices = processor.sample(video.num_frames, video.fps, fps=fps, num_frames=num_frames)
            seconds = [index / video.fps for index in indices]
            # As transformers counts it, over the whole file rather than from the first frame to the last.
            second_per_grid = group / (len(indices) / video.num_frames * video.fps)
            times = VideoTimes.of_frames(seconds, len(indices), group, second_per_grid)
            return cls(Clip(video, indices), "last", times)
        if fps is not None or num_frames is not None:
            raise ValueError("fps, num_frames: expected None with frames, which are all encoded; see sample_frames")
        if frame_times is None:
            return cls(frames, channels, None)
        sized = sized_frames(frames)
        return cls(sized, channels, VideoTimes.of_frames(frame_times, len(sized), group))
