"""`torch.compile` as a rival: set up so that measuring processes choose launch configs alone."""

import os
from collections.abc import Callable

import torch
import torch._inductor.config
import triton
from torch import Tensor

Inputs = dict[str, Tensor]


def set_up_compile() -> None:
    """Let the process that measures choose Inductor's launch configs alone, on a GPU that is its own.

    Otherwise it would find those that the processes of `kernel_jobs.parallel` chose, while they disturbed one another.
    """
    torch._inductor.config.autotune_local_cache = False
    torch._inductor.config.compile_threads = 1
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)  # or Inductor moves it, when it is first used


def compiled(function: Callable[[Inputs], object]) -> Callable[[Inputs], object]:
    """`torch.compile` for these very shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)
