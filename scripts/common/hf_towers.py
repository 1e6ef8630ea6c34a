"""Build, run, load and save transformers' own vision towers, which tests and scripts compare qwenvit with."""

import copy
import importlib
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.torchvision_cpu import define_torchvision_schemas
from qwenvit.config.vision_config import VisionConfig

define_torchvision_schemas()  # before transformers imports torchvision

# family: (transformers.models.<module>, config class, tower class)
_CLASSES = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VLVisionConfig", "Qwen2VisionTransformerPretrainedModel"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLVisionConfig", "Qwen2_5_VisionTransformerPretrainedModel"),
    "qwen2_5_omni": ("qwen2_5_omni", "Qwen2_5OmniVisionEncoderConfig", "Qwen2_5OmniVisionEncoder"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLVisionConfig", "Qwen3VLVisionModel"),
    "qwen3_vl_moe": ("qwen3_vl_moe", "Qwen3VLMoeVisionConfig", "Qwen3VLMoeVisionModel"),
    "qwen3_omni": ("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoderConfig", "Qwen3OmniMoeVisionEncoder"),
    "qwen3_5": ("qwen3_5", "Qwen3_5VisionConfig", "Qwen3_5VisionModel"),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeVisionConfig", "Qwen3_5MoeVisionModel"),
}


def tower_class(family: str) -> type[nn.Module]:
    """Return transformers' tower class for a family (or for `qwen3_vl_moe`, `qwen3_5_moe`)."""
    return _load(family)[1]


def _load(family: str) -> tuple[type, type[nn.Module]]:
    module, config_class, tower = _CLASSES[family]
    try:
        configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
        modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    except ImportError as error:
        import transformers

        raise ImportError(f"transformers {transformers.__version__} has no {family} tower: {error}") from error
    return getattr(configuration, config_class), getattr(modeling, tower)


def build_tower(
    config: VisionConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    outliers: bool = True,
    variant: str | None = None,
) -> nn.Module:
    """Build transformers' tower with sdpa attention, in eval mode, with weights from `seed_weights`.

    Args:
        config: the tower's shape.
        dtype: dtype of the parameters (RoPE frequencies stay fp32, as `from_pretrained` leaves them).
        device: device of the parameters.
        seed: seed of the weights.
        outliers: whether some channels are much larger than the rest, see `seed_weights`.
        variant: `qwen3_vl_moe` or `qwen3_5_moe`, to use that class instead of the one of the config's family.

    Raises:
        ImportError: this transformers has no tower of the family.
    """
    config_class, tower = _load(variant or config.family)
    values = config.to_hf()
    values.pop("model_type")
    model = tower._from_config(config_class(**values), attn_implementation="sdpa", dtype=dtype)  # type: ignore[attr-defined]
    model.to(device).eval()
    seed_weights(model, seed, outliers)
    return model


@torch.no_grad()
def forward(tower: nn.Module, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Run transformers' tower; return last hidden state, merged tokens and DeepStack features.

    transformers 4.57 returns the tokens, with DeepStack features if there are any, and no last hidden state (None).
    """
    output = tower(pixel_values, grid_thw=grid_thw.to(pixel_values.device))
    if isinstance(output, Tensor):
        return None, output, []
    if isinstance(output, tuple):
        return None, output[0], list(output[1])
    deepstack = getattr(output, "deepstack_features", None) or []
    return output.last_hidden_state, output.pooler_output, list(deepstack)


@torch.no_grad()
def seed_weights(tower: nn.Module, seed: int, outliers: bool = True) -> None:
    """Fill a tower with seeded weights of the size of trained ones, by default with outlier channels.

    A few hidden channels of every MLP are 100 times larger than the rest, and the next layer reads them with weights 50
    times smaller. 16-bit arithmetic then meets the range of trained towers, and the tower does not amplify rounding.
    """
    large, small = (100, 0.02) if outliers else (1, 1)
    device = next(tower.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device)

    for name, parameter in tower.named_parameters():
        if parameter.ndim > 1:
            values = normal(parameter) * parameter[0].numel() ** -0.5
            if "patch_embed" in name:
                values *= 0.1  # small enough for an error in a norm's eps to show
            if "fc1" in name or "up_proj" in name or name.endswith("mlp.0.weight"):
                values[:: max(2, len(values) // 3)] *= large
            if "fc2" in name or "down_proj" in name or name.endswith("mlp.2.weight"):
                values[:, :: max(2, values.shape[1] // 3)] *= small
        elif "norm" in name or "ln_q" in name:
            values = 0.1 * normal(parameter) + (1.0 if name.endswith("weight") else 0.0)
        else:
            values = 0.1 * normal(parameter)
        parameter.copy_(values)


def sharing_copy(module: nn.Module) -> nn.Module:
    """Return a copy with configs and buffers of its own that shares the module's parameters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def load_weights(tower: nn.Module, source: Path) -> None:
    """Load safetensors files into transformers' tower by its own tensor names, without any code of qwenvit.

    Args:
        tower: transformers' tower.
        source: a safetensors file, or a folder of them.

    Raises:
        RuntimeError: a tensor is missing or has the wrong shape.
    """
    names = tower.state_dict().keys()
    loaded: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")) if source.is_dir() else [source]:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                name = re.sub(r"^(model\.|thinker\.)?visual\.", "", key)
                if name in names:
                    loaded[name] = tensors.get_tensor(key)
    tower.load_state_dict(loaded, strict=True)


def save_tower(tower: nn.Module, config: VisionConfig, folder: Path) -> Path:
    """Save transformers' tower under the tensor names of its family's published checkpoints; return the folder."""
    prefixes = {"qwen2_vl": "visual.", "qwen2_5_vl": "visual.", "qwen2_5_omni": "thinker.visual."}
    prefix = (prefixes | {"qwen3_omni": "thinker.visual."}).get(config.family, "model.visual.")
    tensors = {f"{prefix}{name}": tensor.cpu() for name, tensor in tower.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder
