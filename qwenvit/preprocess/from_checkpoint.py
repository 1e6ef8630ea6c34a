"""Building the processors that a checkpoint's preprocessor configs describe."""

import os
from pathlib import Path
from typing import Any

from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.preprocess.video_processor import VideoProcessor
from qwenvit.weights.strict_json import read_json


def read_processors(directory: str | os.PathLike[str], family: str) -> tuple[ImageProcessor, VideoProcessor]:
    """Build the processors that transformers 5.23's auto classes build from a checkpoint's directory.

    The image processor is described by `image_processor` in `processor_config.json`, else by
    `preprocessor_config.json`. The video processor is described by `video_processor` in `processor_config.json`, else
    by `video_preprocessor_config.json`, else by `preprocessor_config.json`: Qwen2 and Qwen2.5 models have no config for
    videos and use the pixel bounds of images. Without any of these files the processor is `for_family`'s. Unlike
    `AutoImageProcessor`, which needs `backend="pil"` for it, an image processor whose type ends in `Pil` resizes as
    Pillow does.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file that is not valid JSON, is no regular file or does not describe such a processor.
    """
    folder = Path(directory)
    nested = _read_json(folder / "processor_config.json") or {}
    image_config = _read_json(folder / "preprocessor_config.json")
    video_config = _read_json(folder / "video_preprocessor_config.json")
    if video_config is None:
        video_config = image_config
    video_config = nested.get("video_processor", video_config)
    image_config = nested.get("image_processor", image_config)
    try:
        return (
            ImageProcessor.for_family(family) if image_config is None else ImageProcessor.from_hf(image_config),
            VideoProcessor.for_family(family) if video_config is None else VideoProcessor.from_hf(video_config, family),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"preprocessor configs in {folder}: {error}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where there is no file."""
    # A broken link or a named pipe is there, and read_json refuses it: the defaults may be other settings.
    return read_json(path) if os.path.lexists(path) else None
