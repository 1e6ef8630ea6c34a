"""What launchers ask of a GPU: its multiprocessors, its compute capability, and the constants tuned for it.

Everything that was measured on one GPU and would be measured again for another is in a `Tuning`; add one to `TUNINGS`
for a new GPU.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """Thresholds of the launch decisions, from measurements on one kind of GPU (TUNING.md).

    Wave efficiency is the share of a GPU's program slots that the waves of a launch fill.
    """

    multiprocessors: int
    """Multiprocessors of the measured GPU; numbers of windows and tiles are compared with multiples of it."""
    qkv_wave_efficiency: float
    """From this wave efficiency on, QKV with fused RoPE beats cuBLAS and a separate pass."""
    swiglu_wave_efficiency: float
    """The same for the fused SwiGLU projection."""
    activation_wave_efficiency: float
    """The same for a fused activation whose tiles take several waves."""
    activation_single_wave_efficiency: float
    """The same for a fused activation whose tiles take one wave."""
    patch_wave_efficiency: float
    """The same for the patch embedding that writes rows in the tower's order."""
    narrow_width: int
    """Narrower inputs lower the QKV and activation thresholds to their width over this one: the separate pass is then
    a larger part of the whole."""
    many_query_tiles: int
    """From this number of tiles of 64 queries on, attention of head_dim 80 takes tiles of 128."""


H200 = Tuning(
    multiprocessors=132,
    qkv_wave_efficiency=0.8,
    swiglu_wave_efficiency=0.8,
    activation_wave_efficiency=0.77,
    activation_single_wave_efficiency=0.95,
    patch_wave_efficiency=0.65,
    narrow_width=1380,
    many_query_tiles=1000,
)
TUNINGS = {9: H200}
"""By major compute capability."""


def tuning(major: int) -> Tuning:
    """Return the constants for GPUs of a major compute capability; the H200's where none were measured."""
    return TUNINGS.get(major, H200)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors; 4 for the interpreter, so that its programs loop over several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; (9, 0) for the interpreter, which runs TMA descriptors."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
