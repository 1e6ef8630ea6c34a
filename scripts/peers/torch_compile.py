"""`torch.compile` as a rival of single kernels, and its set-up in the process that measures."""

import os
from collections.abc import Callable

import torch
import torch._inductor.config
import triton

from common.kernel_inputs import Inputs


def set_up_compile() -> None:
    """Make Inductor choose launch configs in the process that measures, which has the GPU to itself.

    Otherwise it would reuse choices that the compiling processes (`run_in_processes`) made while they shared the GPU.
    """
    torch._inductor.config.autotune_local_cache = False
    torch._inductor.config.compile_threads = 1
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)  # or Inductor moves it on first use


def compiled(function: Callable[[Inputs], object]) -> Callable[[Inputs], object]:
    """Compile a function of a kernel's inputs for exactly the shapes that it is called with."""
    return torch.compile(function, fullgraph=True, dynamic=False)
