"""The video processor and frame sampling against transformers' two."""

import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from qwenvit.config.families import FAMILIES
from qwenvit.preprocess.sampling import sample_frames
from qwenvit.preprocess.video_processor import VideoProcessor
from support.pinned import needs_pinned_transformers

HF_PROCESSORS = {"qwen2_vl": Qwen2VLVideoProcessor, "qwen3_vl": Qwen3VLVideoProcessor}
RULES = sorted(HF_PROCESSORS)


def clip(frames: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def hf_process(processor: VideoProcessor, video: object, **options) -> tuple[torch.Tensor, torch.Tensor]:
    out = HF_PROCESSORS[processor.rule].from_dict(processor.to_hf())(
        videos=[video], do_sample_frames=False, return_tensors="pt", **options
    )
    return out["pixel_values_videos"], out["video_grid_thw"]


def assert_equal(ours: tuple, expected: tuple) -> None:
    for our_tensor, hf_tensor in zip(ours, expected, strict=True):
        assert our_tensor.dtype == hf_tensor.dtype
        assert torch.equal(our_tensor, hf_tensor)


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=20, deadline=None)
@given(
    frames=st.integers(2, 7),
    height=st.integers(5, 120),
    width=st.integers(5, 120),
    bounds=st.tuples(st.integers(1000, 60_000), st.integers(1000, 60_000)).map(sorted),
    seed=st.integers(0, 9),
)
def test_videos_are_as_in_transformers(
    rule: str, cap: bool, frames: int, height: int, width: int, bounds: list, seed: int
) -> None:
    processor = VideoProcessor.for_family(rule)
    video = clip(frames, height, width, seed=seed)
    size = dict(zip(("shortest_edge", "longest_edge"), bounds, strict=True))
    expected = hf_process(processor, video, size=size, cap_pixels_per_frame=cap, input_data_format="channels_last")
    assert_equal(processor(video, size=size, cap_pixels_per_frame=cap, channels="last"), expected)
    low, high = bounds
    assert_equal(processor(video, min_pixels=low, max_pixels=high, cap_pixels_per_frame=cap, channels="last"), expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_are_as_in_transformers(family: str) -> None:
    processor = VideoProcessor.for_family(family)
    video = clip(5, 70, 90)
    assert_equal(processor(video), hf_process(processor, video))


@settings(max_examples=300)
@given(
    st.integers(1, 900), st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(RULES), st.booleans(), st.data()
)
def test_grids_are_as_in_transformers(
    frames: int, height: int, width: int, rule: str, cap: bool, data: st.DataObject
) -> None:
    """Compare sizes alone, without pixels, so that long and large videos can be compared too."""
    processor = VideoProcessor(**vars(VideoProcessor.for_family(rule)) | {"cap_pixels_per_frame": cap})
    high = data.draw(st.integers(5000, 10**8))
    processor = processor.with_bounds(data.draw(st.integers(1, high)), high)
    hf = HF_PROCESSORS[rule].from_dict(processor.to_hf())
    video = torch.empty(1, frames, 3, height, width, dtype=torch.uint8, device="meta")
    try:
        resized = hf.resize(video, hf.size, hf.resample, processor.factor, temporal_factor=2, cap_pixels_per_frame=cap)
    except ValueError:
        with pytest.raises(ValueError, match="expected"):
            processor.grid_for(frames, height, width)
        return
    rows, columns = (side // processor.patch_size for side in resized.shape[3:])
    assert processor.grid_for(frames, height, width) == ((frames + 1) // 2, rows, columns)


def test_one_frame() -> None:
    video = clip(1, 60, 60)
    two, three = VideoProcessor.for_family("qwen2_vl"), VideoProcessor.for_family("qwen3_vl")
    assert_equal(two(video), hf_process(two, video))
    with pytest.raises(ValueError, match="larger than temporal_factor"):
        hf_process(three, video)
    with pytest.raises(ValueError, match="frames: expected at least 2, got 1"):
        three(video)


def test_frames_in_every_form(tmp_path) -> None:
    processor = VideoProcessor.for_family("qwen2_5_vl")
    array = clip(3, 60, 90)
    images = [Image.fromarray(frame) for frame in array]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    expected = hf_process(processor, images)
    channels_first = torch.from_numpy(array).permute(0, 3, 1, 2)
    for frames in (array, torch.from_numpy(array), channels_first, images, paths, iter(images), list(array)):
        assert_equal(processor(frames), expected)
    assert_equal(processor(channels_first, channels="first"), expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_gray_and_opaque_frames_are_as_in_transformers(channels: int) -> None:
    processor = VideoProcessor.for_family("qwen3_vl")
    video = clip(4, 60, 90, channels)
    video[..., 3:] = 255
    assert_equal(processor(video), hf_process(processor, video, input_data_format="channels_last"))


def test_transparent_frames_are_within_a_level_of_transformers() -> None:
    processor = VideoProcessor.for_family("qwen3_vl").with_bounds(1, 10**8)
    video = clip(4, 64, 96, 4)  # a size that is not resized
    (ours, grid), (hf, hf_grid) = processor(video), hf_process(processor, video, input_data_format="channels_last")
    assert torch.equal(grid, hf_grid)
    assert 0 < (ours - hf).abs().max() <= 1.001 / 127.5


@pytest.mark.parametrize(
    ("frames", "kind", "message"),
    [
        (clip(1, 60, 90)[0], ValueError, r"expected \[frames, H, W, C\] .* got \[60, 90, 3\]"),
        ([], ValueError, "at least one frame"),
        ([clip(1, 60, 90)[0], clip(1, 90, 60)[0]], ValueError, r"frames\[1\]: expected .* 60 x 90, got 90 x 60"),
        ([clip(1, 60, 90)[0], b"junk"], ValueError, r"frames\[1\]: expected an image file"),
        (clip(2, 60, 90).astype(np.float32), TypeError, r"frames\[0\]: expected uint8, got float32; .*"),
        (clip(2, 3, 90), ValueError, r"frames\[0\]: shape \[3, 90, 3\] could have its channels first or last"),
        (clip(2, 2, 410), ValueError, "frames: expected an aspect ratio"),
        (Image.new("RGB", (60, 90)), TypeError, "expected the path of a video file, a list of images .* got Image"),
        ("video.mp4", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_refused_frames(frames: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        VideoProcessor.for_family("qwen2_vl")(frames)


@pytest.mark.parametrize("convert", [lambda array: array, torch.from_numpy])
def test_the_advice_for_float_frames_works(convert) -> None:
    processor = VideoProcessor.for_family("qwen2_vl")
    video = clip(2, 60, 90)
    with pytest.raises(TypeError, match=r"frames\[0\]: expected uint8, got float32; .* convert it: (.*);") as caught:
        processor(convert(video.astype(np.float32) / 255))
    advice = re.search("convert it: (.*);", str(caught.value))[1]
    converted = eval(advice, {"x": convert(video.astype(np.float32) / 255), "torch": torch})
    assert_equal(processor(converted), processor(video))


@needs_pinned_transformers
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "stated", [{}, {"size": {"shortest_edge": 5000, "longest_edge": 90_000}}, {"max_pixels": 150_000}]
)
def test_from_hf_reads_what_transformers_reads(rule: str, stated: dict) -> None:
    hf = HF_PROCESSORS[rule].from_dict({**stated})
    ours = VideoProcessor.from_hf({"video_processor_type": type(hf).__name__} | stated)
    assert (ours.min_pixels, ours.max_pixels) == (hf.size.shortest_edge, hf.size.longest_edge)
    assert (ours.image_mean, ours.image_std) == (tuple(hf.image_mean), tuple(hf.image_std))
    for name in ("patch_size", "temporal_patch_size", "merge_size", "max_video_tokens"):
        assert getattr(ours, name) == getattr(hf, name)
    for name in ("fps", "num_frames", "min_frames", "max_frames"):
        assert getattr(ours, name) == getattr(hf, name)
    assert ours.cap_pixels_per_frame is bool(hf.cap_pixels_per_frame)
    assert VideoProcessor.from_hf(stated, rule) == ours
    assert VideoProcessor.from_hf(ours.to_hf()) == ours


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "family: needed for a config without a video_processor_type"),
        ({"video_processor_type": "LlavaVideoProcessor"}, "video_processor_type: expected one of .* 'LlavaVideo"),
        ({"video_processor_type": "Qwen2VLVideoProcessor", "resample": 1}, "resample: "),
        ({"video_processor_type": "Qwen2VLVideoProcessor", "max_video_tokens": "9"}, "max_video_tokens: "),
        ({"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 0}, "max_frames: expected .* got 0"),
        ({"video_processor_type": "Qwen2VLVideoProcessor", "min_frames": 4.5}, "min_frames: expected .* got 4.5"),
        ({"video_processor_type": "Qwen3VLVideoProcessor", "num_frames": True}, "num_frames: expected .* got True"),
        ({"video_processor_type": "Qwen3VLVideoProcessor", "fps": -1}, "fps: expected .* got -1"),
        ({"video_processor_type": "Qwen3VLVideoProcessor", "fps": "2"}, "fps: expected .* got '2'"),
    ],
)
def test_unsupported_settings_are_refused_by_name(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoProcessor.from_hf(config)


@settings(max_examples=500)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    total=st.integers(1, 20_000),
    fps=st.floats(0.5, 240),
    how=st.one_of(st.tuples(st.just("fps"), st.floats(0.1, 60)), st.tuples(st.just("num_frames"), st.integers(1, 900))),
    least=st.integers(1, 20),
    most=st.integers(20, 800),
)
@example("qwen2_vl", 1, 30.0, ("fps", 2.0), 4, 768)
@example("qwen3_vl", 1, 30.0, ("fps", 2.0), 4, 768)
@example("qwen2_vl", 10, 30.0, ("num_frames", 1), 4, 768)
@example("qwen2_vl", 17, 30.0, ("num_frames", 14), 4, 768)
@example("qwen2_vl", 20, 30.0, ("num_frames", 21), 4, 768)
def test_sampling_is_as_in_transformers(family: str, total: int, fps: float, how: tuple, least: int, most: int) -> None:
    hf = HF_PROCESSORS[VideoProcessor.for_family(family).rule](min_frames=least, max_frames=most)
    key, value = how
    options = {"target_fps" if key == "fps" else key: value, "min_frames": least, "max_frames": most}
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    try:
        expected = hf.sample_frames(metadata, **{key: value})
    except (ValueError, ZeroDivisionError):
        with pytest.raises(ValueError, match="expected"):
            sample_frames(total, fps, family=family, **options)
        return
    if key == "num_frames" and value > total:  # transformers repeats frames
        with pytest.raises(ValueError, match=f"num_frames: expected at most total_frames={total}, got {value}"):
            sample_frames(total, fps, family=family, **options)
        return
    indices = sample_frames(total, fps, family=family, **options)
    if expected[-1] == total:  # transformers' rounding of the step adds a frame past the end
        expected = expected[:-1]
    assert indices == expected.tolist()
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < total


@pytest.mark.parametrize("total", [1, 2, 7, 100, 1000])
def test_a_clip_of_unknown_rate_is_sampled_as_in_transformers(total: int) -> None:
    unknown = VideoMetadata(total_num_frames=total, fps=None)
    expected = Qwen3VLVideoProcessor().sample_frames(unknown, fps=2)
    assert unknown.fps == 24
    assert sample_frames(total, None, family="qwen3_vl") == expected.tolist()
    with pytest.raises(ValueError, match="no video metadata was provided"):
        Qwen2VLVideoProcessor().sample_frames(VideoMetadata(total_num_frames=total, fps=None), fps=2)
    with pytest.raises(ValueError, match=r"^fps: expected the clip's frames per second, got None"):
        sample_frames(total, None, family="qwen2_vl")
    for rule in RULES if total >= 4 else ():
        expected = HF_PROCESSORS[rule]().sample_frames(VideoMetadata(total_num_frames=total, fps=None), num_frames=4)
        assert sample_frames(total, None, family=rule, num_frames=4) == expected.tolist()


@pytest.mark.parametrize("number", [np.int32, np.int64, np.uint16, float, np.float32, np.float64])
@pytest.mark.parametrize("rule", RULES)
def test_counts_may_be_numpy_integers_and_whole_floats(rule: str, number: type) -> None:
    """`cv2.VideoCapture.get` returns every property as a float."""
    hf = HF_PROCESSORS[rule](min_frames=6, max_frames=20)
    for total in (7, 300):
        metadata = VideoMetadata(total_num_frames=total, fps=30)
        bounds = {"min_frames": number(6), "max_frames": number(20)}
        indices = sample_frames(number(total), number(30), family=rule, target_fps=number(2), **bounds)
        assert indices == hf.sample_frames(metadata, fps=2).tolist()
        indices = sample_frames(number(total), number(30), family=rule, num_frames=number(4))
        assert indices == hf.sample_frames(metadata, num_frames=4).tolist()
        assert all(type(index) is int for index in indices)


@pytest.mark.parametrize(
    ("rule", "stated", "count"),
    [
        ("qwen2_vl", {"fps": 0.25}, 14),
        ("qwen2_vl", {"fps": 2, "max_frames": 16}, 16),
        ("qwen2_vl", {"fps": 0.01, "min_frames": 10}, 10),
        ("qwen2_vl", {"num_frames": 16}, 16),
        ("qwen2_vl", {"num_frames": 16, "fps": None, "max_frames": 8}, 16),
        ("qwen3_vl", {}, 120),
        ("qwen3_vl", {"fps": 0.25}, 15),
        ("qwen3_vl", {"max_frames": 16}, 16),
        ("qwen3_vl", {"fps": 0.01, "min_frames": 10}, 10),
        ("qwen3_vl", {"num_frames": 16, "fps": None}, 16),
    ],
)
def test_a_minute_is_sampled_by_the_checkpoints_settings(rule: str, stated: dict, count: int) -> None:
    """Compare with a whole call of transformers' processor, through the config that `to_hf` writes too."""
    ours = VideoProcessor.from_hf({"video_processor_type": HF_PROCESSORS[rule].__name__} | stated)
    assert VideoProcessor.from_hf(stated, rule) == VideoProcessor.from_hf(ours.to_hf()) == ours
    video = np.arange(1800, dtype=np.uint16).view(np.uint8).reshape(-1, 1, 1, 2).repeat(2, -1)[..., :3]
    for config in (stated, ours.to_hf()):
        hf = HF_PROCESSORS[rule].from_dict(config | {"size": {"shortest_edge": 1, "longest_edge": 10**7}})
        out = hf(
            videos=[video],
            video_metadata=[{"total_num_frames": 1800, "fps": 30.0, "duration": 60.0}],
            do_sample_frames=True,
            return_metadata=True,
            input_data_format="channels_last",
        )
        expected = out["video_metadata"][0].frames_indices
        assert len(expected) == count
        assert ours.sample(1800, 30.0) == expected.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_an_explicit_rate_or_number_replaces_the_processors_own(rule: str) -> None:
    hf = HF_PROCESSORS[rule](max_frames=100)
    metadata = VideoMetadata(total_num_frames=1800, fps=30)
    for own in ({"fps": 0.5}, {"num_frames": 16}):
        ours = VideoProcessor.from_hf(own | {"max_frames": 100}, rule)
        for options in ({"fps": 1}, {"fps": 5.0}, {"num_frames": 8}):
            assert ours.sample(1800, 30, **options) == hf.sample_frames(metadata, **options).tolist()
        with pytest.raises(ValueError, match="num_frames: expected only one of num_frames=8 and fps=1"):
            ours.sample(1800, 30, fps=1, num_frames=8)
    both = VideoProcessor.from_hf({"fps": 1, "num_frames": 16}, rule)  # transformers too refuses only to sample
    with pytest.raises(ValueError, match="num_frames: expected only one of num_frames=16 and fps=1"):
        both.sample(1800, 30)


def test_qwen2s_processor_takes_two_frames_a_second_where_nothing_is_stated() -> None:
    expected = Qwen2VLVideoProcessor(fps=2).sample_frames(VideoMetadata(total_num_frames=1800, fps=30))
    assert VideoProcessor.for_family("qwen2_5_vl").sample(1800, 30) == expected.tolist()


@pytest.mark.parametrize("family", RULES)
def test_sampling_two_frames_a_second_is_the_default(family: str) -> None:
    expected = HF_PROCESSORS[family]().sample_frames(VideoMetadata(total_num_frames=301, fps=29.97), fps=2)
    assert sample_frames(301, 29.97, family=family) == expected.tolist()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"target_fps": 2, "num_frames": 8}, "target_fps"),
        ({"num_frames": 0}, "num_frames"),
        ({"total_frames": 0}, "total_frames"),
        ({"total_frames": 300.5}, "total_frames"),
        ({"total_frames": np.float64("nan")}, "total_frames"),
        ({"total_frames": np.float64("inf")}, "total_frames"),
        ({"total_frames": np.int64(-3)}, "total_frames"),
        ({"total_frames": np.True_}, "total_frames"),
        ({"total_frames": "300"}, "total_frames"),
        ({"total_frames": None}, "total_frames"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": "30"}, "fps"),
        ({"fps": True}, "fps"),
        ({"target_fps": float("inf")}, "target_fps"),
        ({"max_frames": 1.5}, "max_frames"),
        ({"family": "qwen1"}, "family"),
    ],
)
def test_impossible_sampling_is_refused_by_name(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sample_frames(**{"total_frames": 100, "fps": 30.0, "family": "qwen3_vl"} | options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_sampling_does_not_depend_on_torchs_defaults(dtype: torch.dtype) -> None:
    expected = [
        sample_frames(total, 30.0, family="qwen2_vl", num_frames=count) for total, count in ((997, 64), (3001, 768))
    ]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            found = [
                sample_frames(total, 30.0, family="qwen2_vl", num_frames=count)
                for total, count in ((997, 64), (3001, 768))
            ]
    finally:
        torch.set_default_dtype(default)
    assert found == expected
