"""Preprocessor configs: reading and writing them, against transformers."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoVideoProcessor, Qwen2VLImageProcessorPil

from qwenvit.config.families import FAMILIES
from qwenvit.preprocess.from_checkpoint import read_processors
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.video_processor import VideoProcessor
from support.pinned import needs_pinned_transformers


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_configs_survive_transformers(family: str, tmp_path) -> None:
    images, videos = ImageProcessor.for_family(family), VideoProcessor.for_family(family)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images.to_hf()))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(videos.to_hf()))
    assert read_processors(tmp_path, family) == (images, videos)
    AutoImageProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path)
    AutoVideoProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert read_processors(tmp_path, family) == (images, videos)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


@needs_pinned_transformers
@pytest.mark.parametrize(
    "stated",
    [{}, {"image_processor_type": "Qwen2VLImageProcessor"}, {"image_processor_type": "Qwen2VLImageProcessorFast"}],
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_pixels_equal_those_of_the_processor_that_transformers_builds(family: str, stated: dict, tmp_path) -> None:
    config = ImageProcessor.for_family(family).to_hf()
    del config["image_processor_type"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | stated))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))  # asked where no type is stated
    ours = read_processors(tmp_path, family)[0]
    hf = AutoImageProcessor.from_pretrained(tmp_path)
    for image in (noise(480, 640), noise(40, 90), noise(301, 150)):  # the sizes of all are changed
        expected = hf([image], return_tensors="pt")["pixel_values"]
        assert not torch.equal(ours([image], resize="pillow")[0], expected)
        for processor in (ours, ImageProcessor.for_family(family)):
            assert torch.equal(processor([image])[0], expected)


@needs_pinned_transformers
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_config_can_choose_pillow(family: str, tmp_path) -> None:
    ours = replace(ImageProcessor.for_family(family), resize="pillow")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(ours.to_hf()))
    assert read_processors(tmp_path, family)[0] == ours
    image = noise(301, 150)
    for hf in (
        AutoImageProcessor.from_pretrained(tmp_path, backend="pil"),
        Qwen2VLImageProcessorPil.from_pretrained(tmp_path),
    ):
        assert torch.equal(ours([image])[0], hf([image], return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"max_pixels": 9000, "min_pixels": None},
        {"size": {"shortest_edge": 6000, "longest_edge": 70_000}},
        {"size": {"shortest_edge": 6000, "longest_edge": 70_000}, "max_pixels": 9000},
        {"size": {"shortest_edge": 6000, "longest_edge": 70_000}, "patch_size": 16, "image_mean": [0.5, 0.5, 0.5]},
    ],
)
def test_from_hf_reads_what_transformers_reads(config: dict) -> None:
    hf = Qwen2VLImageProcessorPil.from_dict(dict(config))
    ours = ImageProcessor.from_hf(config)
    assert (ours.min_pixels, ours.max_pixels) == (hf.size.shortest_edge, hf.size.longest_edge)
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        assert getattr(ours, name) == getattr(hf, name)
    assert ours.image_mean == tuple(hf.image_mean)
    assert ours.image_std == tuple(hf.image_std)
    assert ImageProcessor.from_hf({"image_processor": config, "processor_class": "Qwen2VLProcessor"}) == ours


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"resample": 2}, "resample"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_resize": False}, "do_resize"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"patch_size": "14"}, "patch_size"),
        ({"size": {"height": 224, "width": 224}}, "size"),
        ({"min_pixels": 10, "max_pixels": 9}, "min_pixels"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}, "image_processor_type"),
        ({"do_center_crop": True}, "do_center_crop"),
    ],
)
def test_unsupported_settings_are_refused_by_name(config: dict, name: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"^{name}[:=]"):
        ImageProcessor.from_hf(config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: {name}[:=]"):
        read_processors(tmp_path, "qwen2_vl")


FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
FIXED |= {"do_center_crop": False, "do_pad": False}


@pytest.mark.parametrize("key", FIXED)
@pytest.mark.parametrize("kind", [ImageProcessor, VideoProcessor])
def test_a_step_is_never_switched(kind: type, key: str) -> None:
    processor = kind.for_family("qwen3_vl")
    stated = processor.to_hf()
    for same in (FIXED[key], None):
        assert kind.from_hf(stated | {key: same}) == processor
    with pytest.raises(ValueError, match=f"^{key}: only {FIXED[key]} is supported, got {not FIXED[key]}$"):
        kind.from_hf(stated | {key: not FIXED[key]})


NESTED = {"image_processor": {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 50_000}}
NESTED_VIDEO = {"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor", "max_pixels": 150_000}}
IMAGES = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 60_000}
VIDEOS = {"video_processor_type": "Qwen3VLVideoProcessor", "size": {"shortest_edge": 4096, "longest_edge": 80_000}}


@needs_pinned_transformers
@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config": IMAGES},
        {"preprocessor_config": IMAGES, "video_preprocessor_config": VIDEOS},
        {"preprocessor_config": IMAGES, "processor_config": {"processor_class": "Qwen2VLProcessor"}},
        {"preprocessor_config": IMAGES, "processor_config": NESTED},
        {"preprocessor_config": IMAGES, "video_preprocessor_config": VIDEOS, "processor_config": NESTED_VIDEO},
        {"processor_config": NESTED | NESTED_VIDEO},
        {"preprocessor_config": IMAGES | {"image_processor_type": "Qwen2VLImageProcessorFast"}, "config": "qwen3_vl"},
        {"preprocessor_config": IMAGES | {"image_processor_type": "Qwen2VLImageProcessorFast"}, "config": "qwen2_vl"},
    ],
)
def test_files_take_precedence_as_in_transformers(files: dict, tmp_path) -> None:
    family = files.get("config", "qwen2_vl")
    for name, content in (files | {"config": {"model_type": family}}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for ours, hf in zip(
        read_processors(tmp_path, family),
        (AutoImageProcessor.from_pretrained(tmp_path), AutoVideoProcessor.from_pretrained(tmp_path)),
        strict=True,
    ):
        assert (ours.min_pixels, ours.max_pixels) == (hf.size.shortest_edge, hf.size.longest_edge)
        assert (ours.patch_size, ours.image_mean) == (hf.patch_size, tuple(hf.image_mean))
        if isinstance(ours, VideoProcessor):
            assert ours.to_hf()["video_processor_type"] == type(hf).__name__
            assert ours.max_video_tokens == hf.max_video_tokens


@pytest.mark.parametrize("config", [[], {"image_processor": 3}])
def test_a_config_is_a_mapping(config: object) -> None:
    with pytest.raises(TypeError, match="config: expected a mapping"):
        ImageProcessor.from_hf(config)


def test_without_files_the_familys_processors_are_built(tmp_path) -> None:
    expected = ImageProcessor.for_family("qwen3_5"), VideoProcessor.for_family("qwen3_5")
    assert read_processors(tmp_path, "qwen3_5") == expected


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xef\xbb\xbf{}", b'{"patch_size": 14, "patch_size": 16}', b"[" * 5000]
)
@pytest.mark.parametrize("part", ["preprocessor", "video_preprocessor", "processor"])
def test_broken_files_are_named(part: str, content: bytes, tmp_path) -> None:
    (tmp_path / f"{part}_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"/{part}_config.json: expected "):
        read_processors(tmp_path, "qwen2_vl")


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_files_that_cannot_be_read_are_not_passed_over(tmp_path) -> None:
    file = tmp_path / "preprocessor_config.json"
    os.mkfifo(file)
    with pytest.raises(ValueError, match="expected a regular file, got a named pipe"):
        read_processors(tmp_path, "qwen2_vl")
    file.unlink()
    file.symlink_to("absent")
    with pytest.raises(FileNotFoundError):
        read_processors(tmp_path, "qwen2_vl")


def test_unknown_family() -> None:
    with pytest.raises(ValueError, match="family: expected one of"):
        ImageProcessor.for_family("qwen1")
