"""Choose the tower by `impl`, config and device."""

import importlib.util
import os

import torch

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.attention import HEAD_DIMS
from qwenvit.towers.fast import ACTIVATIONS, FastTower
from qwenvit.towers.reference import ReferenceTower

Tower = ReferenceTower | FastTower
MIN_TRITON = (3, 5)
MIN_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with bfloat16."""


def tower_class(impl: Impl, config: VisionConfig, device: torch.device) -> type[ReferenceTower] | type[FastTower]:
    """Return the class of the tower to build.

    Args:
        impl: `"reference"`, `"triton"` for the fast tower, or `"auto"` for the fast tower on a GPU that can run it.
        config: the tower's config.
        device: the device that the tower will run on.

    Raises:
        ValueError: an unknown `impl`, or `"triton"` where the fast tower cannot run; the message gives the reason.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'reference', got {impl!r}")
    if impl == "reference" or (impl == "auto" and device.type != "cuda"):
        return ReferenceTower
    obstacle = _obstacle(config, device)
    if impl == "triton" and obstacle:
        raise ValueError(f"impl: 'triton' cannot run here: {obstacle}; use 'reference' or 'auto'")
    return ReferenceTower if obstacle else FastTower


def _obstacle(config: VisionConfig, device: torch.device) -> str | None:
    """Return the reason why the fast tower cannot run here, or None."""
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim {config.head_dim} is none of {HEAD_DIMS}"
    activations = ("silu",) if config.traits.gated_mlp else tuple(ACTIVATIONS)
    if config.hidden_act not in activations:
        return f"hidden_act {config.hidden_act!r} is none of {activations}"
    if torch.version.hip:
        return "these kernels are for NVIDIA's GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton  # type: ignore[import-untyped]  # slow to import, so not before it is needed

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, MIN_TRITON))}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return f"{device} has compute capability {capability}, below {MIN_CAPABILITY}"
        return None
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted else f"{device} is no CUDA device"
