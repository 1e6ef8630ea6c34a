"""vLLM's multimodal processors without the work on pixels: images travel to the tower's side as RGB bytes."""

import importlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from qwenvit.integrations.vllm.options import options_of
from qwenvit.integrations.vllm.pixel_rule import RGB, RGB_SIZE, PixelRule, read_rule


class PixelInfo:
    """In front of vLLM's processing info of a model: its Hugging Face processor returns the bytes of images.

    Sizes, placeholders, hashes and caches are vLLM's. Videos, embeddings, and images that are no bytes (float tensors,
    for example) are processed as ever.
    """

    ctx: Any

    @property
    def pixels(self) -> PixelRule | str:
        """How the tower's side computes pixel values; or why the processor does."""
        if options_of(self.ctx.model_config).pixels is False:
            return "additional_config: qwenvit.pixels is false"
        return self.reproduced

    @cached_property
    def reproduced(self) -> PixelRule | str:
        """How the pixel values of this checkpoint's processor are computed from bytes; or why they cannot be."""
        model_config = self.ctx.model_config
        multimodal = model_config.multimodal_config
        if multimodal.get_limit_per_prompt("image") == 0:
            return "limit_mm_per_prompt allows no image"
        normalised_by_tower = getattr(multimodal, "mm_device_do_normalize", False)
        try:
            processor = super().get_hf_processor()  # type: ignore[misc]
            rule = read_rule(processor.image_processor, torch.uint8 if normalised_by_tower else model_config.dtype)
            importlib.import_module("qwenvit.integrations.vllm.pixel_images")
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            return str(error)
        options = multimodal.merge_mm_processor_kwargs({})
        options |= options.get("images_kwargs", {})
        if options.get("device", "cpu") != "cpu":
            return f"mm_processor_kwargs: device is {options['device']!r}: the processor has a GPU of its own"
        obstacle = rule.obstacle(options)
        return rule if obstacle is None else f"mm_processor_kwargs: {obstacle}"

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Return the Hugging Face processor."""
        processor = super().get_hf_processor(**kwargs)  # type: ignore[misc]
        if isinstance(self.pixels, str):
            return processor
        from qwenvit.integrations.vllm.pixel_images import returning_bytes  # some transformers have not its classes

        return returning_bytes(processor, self.pixels)


class PixelProcessor:
    """In front of vLLM's multimodal processor of a model: images may have bytes in place of pixel values."""

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))  # type: ignore[misc]
        if RGB in hf_inputs:
            fields[RGB] = MultiModalFieldConfig.flat_from_sizes("image", hf_inputs[RGB_SIZE].prod(-1) * 3)
            fields[RGB_SIZE] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields


def bytes_rule(model_config: ModelConfig) -> PixelRule | None:
    """Return how the tower's side computes pixel values from bytes; None where it cannot.

    A front end with other options may send bytes although they are switched off here: they are understood all the same.
    """
    reproduced = _info(model_config).reproduced
    return None if isinstance(reproduced, str) else reproduced


def pixels_obstacle(model_config: ModelConfig) -> str | None:
    """Return why images do not travel as bytes; None if they do."""
    pixels = _info(model_config).pixels
    return pixels if isinstance(pixels, str) else None


def _info(model_config: ModelConfig) -> PixelInfo:
    return cast(PixelInfo, MULTIMODAL_REGISTRY.get_processing_info(model_config))
