"""What launchers ask of a GPU: its multiprocessors, its generation, and the constants measured for it.

Everything that was tuned on one GPU and would be tuned again on another is here, under a name.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """Thresholds of the launch decisions, measured on one kind of GPU (`TUNING.md`)."""

    multiprocessors: int
    """Multiprocessors of the GPU the thresholds were measured on."""
    pass_share_width: int
    """Input channels of a product at which the separate pass after it costs little: narrower products tolerate
    emptier waves, in proportion to their width."""


H200 = Tuning(multiprocessors=132, pass_share_width=1380)
TUNINGS: dict[tuple[int, int], Tuning] = {(9, 0): H200}
"""By compute capability. A new GPU's constants go here."""


def tuning(device: torch.device) -> Tuning:
    """Return the constants for a GPU; those of the H200 where none were measured."""
    return TUNINGS.get(capability(device), H200)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors; 4 for the interpreter, so that its programs walk over several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; (9, 0) for the interpreter, which runs TMA descriptors."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
