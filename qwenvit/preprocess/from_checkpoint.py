"""The processors that a checkpoint's preprocessor configs describe."""

import json
import os
from pathlib import Path
from typing import Any

from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.video_processor import VideoProcessor


def read_processors(directory: str | os.PathLike[str], family: str) -> tuple[ImageProcessor, VideoProcessor]:
    """The processors that transformers 5.23's auto classes read from a checkpoint's directory.

    The image processor comes from `processor_config.json` (if it has an `image_processor`), else
    `preprocessor_config.json`. The video processor comes from `processor_config.json` (`video_processor`), else
    `video_preprocessor_config.json`, else `preprocessor_config.json`, which is how Qwen2 and Qwen2.5 models get the
    pixel bounds of images for their videos. Without any of them it is the family's own.

    Raises:
        ValueError: a file that is not JSON or does not describe such a processor.
    """
    folder = Path(directory)
    nested = _read_json(folder / "processor_config.json") or {}
    images = _read_json(folder / "preprocessor_config.json")
    videos = _read_json(folder / "video_preprocessor_config.json")
    images, videos = (
        nested.get("image_processor", images),
        nested.get("video_processor", images if videos is None else videos),
    )
    try:
        return (
            ImageProcessor.for_family(family) if images is None else ImageProcessor.from_hf(images),
            VideoProcessor.for_family(family) if videos is None else VideoProcessor.from_hf(videos, family),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"preprocessor configs in {folder}: {error}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
