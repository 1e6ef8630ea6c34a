"""Call a model's multimodal processor in vLLM, its own and qwenvit's: a program for the Python of vLLM's environment.

    python vllm_processors.py JOB ANSWERS

JOB is a file of `torch.save`: `{"configs": {name: config}, "prompts": {name: prompt}}`. A config has arguments of
`vllm.config.ModelConfig`, of which those that this vLLM lacks are left out, and perhaps `options` of the plugin; a
prompt has `prompt`, `multi_modal_data` and perhaps `mm_processor_kwargs`. ANSWERS is a file of the same kind,
`{(config, whose, cached, prompt): answer}`: `whose` is `"vllm"` or `"qwenvit"`, `cached` says whether the processor had
vLLM's cache, and an answer is what the engine and the tower get, or the name of an error; its `bytes` tells how many
bytes of images came to the engine, and pixel values are computed from these on the CPU. `(config, "obstacle")` is why
images do not travel as bytes.
"""

import inspect
import sys

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import get_model_architecture
from vllm.multimodal.cache import MultiModalProcessorOnlyCache
from vllm.multimodal.processing import InputProcessingContext
from vllm.plugins import load_general_plugins
from vllm.tokenizers import cached_tokenizer_from_config

from qwenvit.integrations.vllm.options import Options
from qwenvit.integrations.vllm.pixel_model import PixelModel
from qwenvit.integrations.vllm.pixel_processor import bytes_rule, pixels_obstacle


class Tower(PixelModel):
    """In place of a model: returns what its vision tower would get."""

    def embed_multimodal(self, **kwargs):
        return self._with_pixel_values(kwargs)


def call(factories, context, cache, prompt, tower):
    options = {}
    takes_cache = "cache" in inspect.signature(factories.build_processor).parameters  # before 0.28
    processor = factories.build_processor(context, **({"cache": cache} if takes_cache else {}))
    if not takes_cache:
        options["cache"] = cache
    try:
        items = processor.info.parse_mm_data(prompt["multi_modal_data"])
        kwargs = prompt.get("mm_processor_kwargs", {})
        result = processor(prompt["prompt"], items, hf_processor_mm_kwargs=kwargs, **options)
    except Exception as error:  # noqa: BLE001  vLLM's and transformers' errors of any kind
        return type(error).__name__
    data = result["mm_kwargs"].get_data()
    rgb = data.get("image_rgb")
    return {
        "tokens": result["prompt_token_ids"],
        "placeholders": {
            kind: [(one.offset, one.length) for one in ranges] for kind, ranges in result["mm_placeholders"].items()
        },
        "hashes": result["mm_hashes"],
        "data": tower.embed_multimodal(**data),
        "bytes": 0 if rgb is None else rgb.numel(),
    }


def main(job: str, answers: str) -> None:
    asked = torch.load(job, weights_only=False)
    load_general_plugins()
    found = {}
    for name, arguments in asked["configs"].items():
        options = arguments.pop("options", {})
        known = inspect.signature(ModelConfig).parameters
        config = ModelConfig(**{key: value for key, value in arguments.items() if key in known})
        config.qwenvit = Options(**options)  # as VllmConfig does
        found[name, "obstacle"] = pixels_obstacle(config)
        context = InputProcessingContext(config, cached_tokenizer_from_config(config))
        model = get_model_architecture(config)[0]
        own = next(
            one for one in model.__mro__ if one.__module__.startswith("vllm.") and "_processor_factory" in vars(one)
        )
        tower = Tower()
        tower.qwenvit_pixels = bytes_rule(config)
        for whose, factories in (("vllm", own._processor_factory), ("qwenvit", model._processor_factory)):
            for cached in (False, True):
                cache = MultiModalProcessorOnlyCache(config) if cached else None
                for prompt, contents in asked["prompts"].items():
                    found[name, whose, cached, prompt] = call(factories, context, cache, contents, tower)
    torch.save(found, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
