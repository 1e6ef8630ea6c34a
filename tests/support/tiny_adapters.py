"""Adapters that peft makes for tiny whole models of transformers: an independent source of merged weights."""

import copy
import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwenvit.weights.adapters.adapter import ADAPTER_CONFIG, ADAPTER_FILE, Adapter
from support.tiny_models import build, visual
from support.tiny_towers import canonical_name

FAMILIES = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "qwen2_5_omni": "qwen2_5_omni",
    "qwen3_omni": "qwen3_omni_moe",
}
"""Name of each family in transformers."""
Tensors = dict[str, torch.Tensor]


@cache
def base_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a whole model whose parameters all differ; copy it before changing it."""
    model = build(FAMILIES[family], depth=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def tower_tensors(model: nn.Module) -> Tensors:
    """Return copies of the tower's tensors by canonical name."""
    return {canonical_name(name): tensor.clone() for name, tensor in visual(model).state_dict().items()}


def adaptable_modules(model: nn.Module) -> list[str]:
    """Return the paths of the modules that LoRA can adapt."""
    kinds = (nn.Linear, nn.Conv3d, nn.Embedding)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and "audio" not in name]


def wrap(model: nn.Module, seed: int = 0, **config: Any) -> peft.PeftModel:
    """Return a copy of the model with an adapter, all of whose trained weights are random."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                assert ".lora_" in name or ".modules_to_save." in name or name.endswith(".bias")
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return wrapped


def merged_by_peft(model: nn.Module, folder: Path) -> Tensors:
    """Return the tower's tensors after peft has merged the adapter in `folder` into a copy of the model."""
    return tower_tensors(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload())


def merged_by_us(adapter: Adapter, family: str, model: nn.Module) -> Tensors:
    """Return the tower's tensors after this package has checked and merged the adapter."""
    tensors = tower_tensors(model)
    adapter.check({name: tensor.shape for name, tensor in tensors.items()}, family)
    adapter.merge(tensors, family)
    return tensors


def differing(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that differ in a bit or in dtype."""
    assert actual.keys() == expected.keys()
    return [
        name
        for name in expected
        if actual[name].dtype != expected[name].dtype or not torch.equal(actual[name], expected[name])
    ]


def configure(folder: Path, **changes: object) -> None:
    """Change settings of the adapter's config; None removes one."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | changes
    config = {key: value for key, value in config.items() if key not in changes or value is not None}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))


def change(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, without: Collection[str] = ()) -> None:
    """Add tensors to the adapter's file, and remove those named `without`."""
    kept = {name: tensor for name, tensor in load_file(folder / ADAPTER_FILE).items() if name not in without}
    save_file(kept | dict(tensors or {}), folder / ADAPTER_FILE)
