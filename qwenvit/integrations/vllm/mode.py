"""Which parts of a model the plugin replaces, and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.integrations.vllm.attention import use_attention
from qwenvit.integrations.vllm.options import Options
from qwenvit.towers.choose import Tower, tower_class
from qwenvit.towers.fast import FastTower

Mode = Literal["tower", "attention", "off"]


@dataclass(frozen=True)
class Setup:
    """What of vLLM's configuration decides whether the tower can be replaced."""

    tensor_parallel_size: int = 1
    tower_parallel: str = "weights"
    """vLLM's `mm_encoder_tp_mode`."""
    pipeline_parallel_size: int = 1
    quantized: str | None = None
    """A layer of vLLM's tower that is quantised, and how; None if there is none."""
    fp8_attention: bool = False
    """Whether `mm_encoder_attn_dtype` is fp8."""
    tower_lora: bool = False
    """Whether LoRA adapters may apply to the tower."""
    offloaded: bool = False
    """Whether weights of the tower are kept in the memory of the CPU."""
    load_format: str = "auto"
    """How vLLM loads weights."""
    encoder_graphs: bool = False
    """vLLM's `cudagraph_mm_encoder`."""
    compiled: bool = False
    """vLLM's `compile_mm_encoder`."""
    takes_keys: bool = True
    """Whether `additional_config` is a dictionary, with which vLLM's cache of compiled code tells ours from its own."""

    @classmethod
    def read(cls, vllm_config: Any, visual: nn.Module) -> "Setup":
        """Read a `VllmConfig` and the tower that vLLM has built."""
        parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
        multimodal = vllm_config.model_config.multimodal_config
        return cls(
            tensor_parallel_size=parallel.tensor_parallel_size,
            tower_parallel=multimodal.mm_encoder_tp_mode,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
            quantized=_quantized_layer(visual),
            fp8_attention=multimodal.mm_encoder_attn_dtype == "fp8",
            tower_lora=vllm_config.lora_config is not None and vllm_config.lora_config.enable_tower_connector_lora,
            offloaded=_is_offloaded(visual),
            load_format=str(vllm_config.load_config.load_format),
            encoder_graphs=compilation.cudagraph_mm_encoder,
            compiled=compilation.compile_mm_encoder,
            takes_keys=isinstance(vllm_config.additional_config, dict),
        )

    def tower_obstacle(self) -> str | None:
        """Return why the whole tower cannot be replaced, or None."""
        if self.tensor_parallel_size > 1 and self.tower_parallel != "data":
            return (
                f"tensor_parallel_size={self.tensor_parallel_size} splits the tower's weights "
                "(mm_encoder_tp_mode='data' does not)"
            )
        if self.pipeline_parallel_size > 1:
            return f"pipeline_parallel_size={self.pipeline_parallel_size} splits the model into stages"
        if self.quantized:
            return f"the tower is quantised ({self.quantized})"
        if self.fp8_attention:
            return "mm_encoder_attn_dtype='fp8' asks for attention in fp8"
        if self.tower_lora:
            return "enable_tower_connector_lora lets LoRA adapters change the tower's layers"
        if self.offloaded:
            return "weights of the tower are offloaded to the CPU"
        if self.load_format in ("sharded_state", "runai_streamer_sharded", "tensorizer"):
            return f"load_format={self.load_format!r} loads parameters of vLLM's own tower by their names"
        return None

    def attention_obstacle(self, impl: Impl, device: torch.device) -> str | None:
        """Return why the attention cannot be replaced, or None."""
        if self.encoder_graphs and impl == "reference" and device.type == "cuda":
            return "cudagraph_mm_encoder cannot capture the attention with qwenvit.impl 'reference'"
        if self.compiled and not self.takes_keys:
            return "compile_mm_encoder may take code compiled for vLLM's own attention from its cache"
        return None


def _quantized_layer(visual: nn.Module) -> str | None:
    for name, module in visual.named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        if method != "NoneType" and not method.startswith("Unquantized"):
            return f"{name}: {method}"
    return None


def _is_offloaded(visual: nn.Module) -> bool:
    parameters = list(visual.parameters())
    devices = {parameter.device.type for parameter in parameters}
    return len(devices) > 1 or any(hasattr(parameter, "_vllm_is_uva_offloaded") for parameter in parameters)


@dataclass(frozen=True)
class Choice:
    """What is replaced, and why not what comes before it."""

    mode: Mode
    reason: str = ""
    """Why the tower (`"attention"`), or also the attention (`"off"`), is vLLM's own."""
    impl: Impl = "auto"
    """Implementation of the operations."""
    make_tower: Callable[[], Tower] | None = None
    """Makes our tower on torch's default device, without weights; None but in tower mode."""

    def __str__(self) -> str:
        if self.mode == "tower":
            kind = "reference" if self.impl == "reference" else "fast"
            more = " in place of vLLM's, whose cudagraph_mm_encoder and compile_mm_encoder do not apply"
            return f"tower mode, with the {kind} tower (impl {self.impl!r}){more}"
        if self.mode == "attention":
            return f"attention mode (impl {self.impl!r}) in vLLM's tower, because {self.reason}"
        return f"off, with vLLM's own tower, because {self.reason}"


def choose_mode(
    options: Options, setup: Setup, visual: nn.Module, hf_config: Mapping[str, Any], device: torch.device
) -> Choice:
    """Choose what to replace; replace the attention if that is the choice.

    Args:
        options: what the user wishes.
        setup: vLLM's configuration.
        visual: vLLM's tower, whose attention is replaced in attention mode.
        hf_config: the content of the checkpoint's config.json.
        device: where the tower runs.

    Raises:
        ValueError: an explicit wish cannot be met; the message says why.
    """
    if device.type == "cpu" and options.tower == options.impl == "auto":
        return Choice("off", "on a CPU qwenvit has no kernels, and qwenvit.tower and qwenvit.impl ask for none else")
    reason = "qwenvit.tower is 'attention'"
    if options.tower != "attention":
        try:
            return _choose_tower(options, setup, hf_config, device)
        except ValueError as error:
            if options.tower == "tower":
                raise ValueError(f"additional_config: qwenvit.tower: 'tower' cannot be used: {error}") from error
            reason = str(error)
    try:
        if obstacle := setup.attention_obstacle(options.impl, device):
            raise ValueError(obstacle)
        use_attention(visual, VisionConfig.from_hf(hf_config), options.impl)
    except ValueError as error:
        if options.tower == "attention":
            raise ValueError(f"additional_config: qwenvit.tower: 'attention' cannot be used: {error}") from error
        return Choice("off", f"{reason}; {error}")
    return Choice("attention", reason, options.impl)


def _choose_tower(options: Options, setup: Setup, hf_config: Mapping[str, Any], device: torch.device) -> Choice:
    """Return the choice of a tower, or raise ValueError with the reason why there is none."""
    if obstacle := setup.tower_obstacle():
        raise ValueError(obstacle)
    config = VisionConfig.from_hf(hf_config)
    # On a GPU the reference tower is no gain over vLLM's: take it only if it is asked for.
    impl: Impl = "triton" if options.impl == "auto" and device.type == "cuda" else options.impl
    tower = tower_class(impl, config, device)
    if issubclass(tower, FastTower):
        return Choice("tower", impl=impl, make_tower=partial(tower, config, impl))
    return Choice("tower", impl="reference", make_tower=partial(tower, config))
