"""Without a GPU, Triton's kernels run in its interpreter, on CPU tensors.

Triton decides at each `@triton.jit`, so this has to be said before anything imports a kernel (`qwenvit.ops` does so on
first use). With a GPU nothing is set, and the same tests run the compiled kernels there.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
