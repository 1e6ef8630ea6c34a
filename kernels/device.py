"""What launchers ask of a GPU: its multiprocessors, its compute capability, and the constants tuned for it.

A `Tuning` has the thresholds that depend on the GPU they were measured on: add one to `TUNINGS` for a new GPU. Tile
shapes, warps and registers for a generation of GPUs are in the `*_config` function or `*_TILE` beside each kernel.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """Thresholds of launch decisions, measured on one kind of GPU (TUNING.md).

    Those that compare numbers of tokens or windows choose tiles, stages and warps alone, never the order of a sum.
    """

    multiprocessors: int
    """Multiprocessors of the measured GPU. Launch decisions compare numbers of windows and tiles with it."""
    fused_qkv_width: int
    """QKV projections of at most this many input columns rotate queries and keys in the product."""
    many_query_tiles: int
    """From this many tiles of 64 queries on, attention of head_dim 80 uses tiles of 128 queries."""


H200 = Tuning(
    multiprocessors=132,
    fused_qkv_width=768,
    many_query_tiles=1000,
)
TUNINGS = {9: H200}
"""Constants by major compute capability."""


def tuning(major: int) -> Tuning:
    """Return the constants for GPUs of a major compute capability; the H200's if none were measured."""
    return TUNINGS.get(major, H200)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors; 4 in Triton's interpreter, so that a program loops over tiles there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; (9, 0) in Triton's interpreter, which supports TMA descriptors."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
