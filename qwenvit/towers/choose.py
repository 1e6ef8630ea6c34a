"""Which tower runs: what `impl` and the device decide."""

import importlib.util
import os

import torch

from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.attention import HEAD_DIMS
from qwenvit.towers.fast import ACTIVATIONS, FastTower
from qwenvit.towers.reference import ReferenceTower

Tower = ReferenceTower | FastTower
OLDEST_TRITON = (3, 4)
OLDEST_GPU = (8, 0)
"""Compute capability of the first GPUs with bfloat16."""


def tower_class(impl: Impl, config: VisionConfig, device: torch.device) -> type[ReferenceTower] | type[FastTower]:
    """The tower to build.

    Args:
        impl: `"reference"`, `"triton"` for the fast tower, or `"auto"` for the fast one on a GPU that can run it.
        config: of the tower.
        device: where it will run.

    Raises:
        ValueError: an unknown `impl`, or a fast tower that could not run there; the reason is named.
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
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim {config.head_dim} is none of {HEAD_DIMS}"
    activations = ("silu",) if config.traits.gated_mlp else tuple(ACTIVATIONS)
    if config.hidden_act not in activations:
        return f"hidden_act {config.hidden_act!r} is none of {activations}"
    if torch.version.hip:
        return "these kernels are for NVIDIA's GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton  # type: ignore[import-untyped]  # slow, and only now needed

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= OLDEST_GPU else f"{device} has compute capability {capability}, below {OLDEST_GPU}"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted else f"{device} is no CUDA device"
