"""The times of videos: those that transformers' processors write into prompts and positions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from qwenvit.encoder import Encoder
from qwenvit.outputs import VideoTimes
from qwenvit.towers.reference import ReferenceTower
from support.towers import narrow


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def encoder(request):
    torch.manual_seed(0)
    return Encoder(ReferenceTower(narrow(request.param, depth=1)))


def expected(indices, total_frames, fps):
    """The times by transformers' processors, of Qwen3-VL and of Qwen2.5-VL."""
    metadata = VideoMetadata(total_num_frames=total_frames, fps=fps, frames_indices=list(indices))
    timestamps = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2)
    return VideoTimes(tuple(timestamps), 2 / metadata.sampled_fps)


@pytest.mark.parametrize("options", [{}, {"fps": 3}, {"num_frames": 6}], ids=str)
def test_a_files_times(encoder, tmp_path, options):
    av = pytest.importorskip("av", reason='needs PyAV: pip install "av>=15"')
    path, total_frames, rate = tmp_path / "clip.mkv", 71, Fraction(30_000, 1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "bgr0"
        for number in range(total_frames):
            frame = np.full((64, 64, 3), number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (item,) = encoder.encode_video(path, **options)
    indices = encoder.video_processor.sample(total_frames, float(rate), **options)
    assert item.times == expected(indices, total_frames, float(rate))
    assert len(item.times.timestamps) == item.grid[0]
    with pytest.raises(ValueError, match="frame_times: expected None with a video file"):
        encoder.encode_video(path, frame_times=[0.0, 1.0])


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("of", ["an array", "a list", "a generator"])
def test_the_times_of_frames(encoder, count, of):
    frames = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    frames = {"an array": frames, "a list": list(frames), "a generator": (frame for frame in frames)}[of]
    fps = 2.5  # of all frames
    (item,) = encoder.encode_video(frames, frame_times=[index / fps for index in range(count)])
    times = expected(range(count), count, fps)
    assert item.times.timestamps == times.timestamps
    assert item.times.second_per_grid == pytest.approx(times.second_per_grid)
    assert len(item.times.timestamps) == item.grid[0]


def test_times_that_are_not_known_or_impossible(encoder):
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    assert encoder.encode_video(frames)[0].times is None
    assert encoder.encode(frames[0])[0].times is None
    for frame_times, message in (
        ([0, 1, 2], "one for each of 4 frames, got 3"),
        ([0, 2, 1, 3], "strictly ascending seconds"),
        ([0, 0, 0, 0], "strictly ascending seconds"),
        ([-1, 0, 1, 2], "strictly ascending seconds from 0"),
        ([0, 1, 2, math.inf], "strictly ascending seconds"),
        ([0, math.nan, 2, 3], "strictly ascending seconds"),
    ):
        with pytest.raises(ValueError, match=f"frame_times: expected {message}"):
            encoder.encode_video(frames, frame_times=frame_times)
