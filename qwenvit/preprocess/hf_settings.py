"""Reading and writing Hugging Face's preprocessor configs."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qwenvit.preprocess.patch_processor import PatchProcessor
from qwenvit.preprocess.resize import bounds_from_size


def config_section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the section `name` of a nested `processor_config.json`; return a flat config unchanged.

    Raises:
        TypeError: the config or its section is not a mapping.
    """
    section = config.get(name, config) if isinstance(config, Mapping) else config
    if not isinstance(section, Mapping):
        raise TypeError(f"config: expected a mapping as read from {name}'s json, got {type(section).__name__}")
    return section


def read_hf_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PatchProcessor` that a Hugging Face preprocessor config states.

    Raises:
        ValueError: another value of a setting that is fixed here (bicubic, 1/255, all steps on), or an unknown `size`.
    """
    fixed = {"resample": 3, "rescale_factor": 1 / 255}
    fixed |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    fixed |= dict.fromkeys(("do_center_crop", "do_pad"), False)
    for key, expected in fixed.items():
        if hf.get(key) is not None and hf[key] != expected:
            raise ValueError(f"{key}: only {expected!r} is supported, got {hf[key]!r}")
    settings: dict[str, Any] = bounds_from_size(hf.get("size"))
    settings |= {field.name: hf[field.name] for field in fields(PatchProcessor) if hf.get(field.name) is not None}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def write_hf_settings(processor: PatchProcessor) -> dict[str, Any]:
    """Return the settings of a processor under transformers' names, as `read_hf_settings` reads them."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "size": {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "patch_size": processor.patch_size,
        "temporal_patch_size": processor.temporal_patch_size,
        "merge_size": processor.merge_size,
    }
