"""Every kernel once, on a GPU, to be run under NVIDIA's compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck python tests/kernels/sanitize.py

Without torch's caching allocator every tensor is an allocation of its own, so that memcheck sees its bounds.
"""

import torch

from qwenvit import ops
from support.compile_ahead import call_everything


def main() -> None:
    torch.set_default_device("cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        call_everything(dtype)
        lengths = torch.tensor([0, 1, 0, 64, 5, 63, 100, 0], device="cpu")
        bounds = lengths.cumsum(0).to("cuda", torch.int32)
        for head_dim in (64, 72, 80):
            q, k, v = torch.randn(233, 3, 3, head_dim).to(dtype).unbind(1)
            for longest in (64, None):
                ops.rope_attention(q, k, v, None, None, bounds, longest)
            if dtype != torch.float32:  # on Hopper its tiles run on from head to head
                q, k, v = torch.randn(3136, 3, 16, head_dim).to(dtype).unbind(1)
                ops.rope_attention(q, k, v, None, None, torch.tensor([0, 3136], dtype=torch.int32), None)
        torch.cuda.synchronize()
        print(f"{dtype}: every kernel ran")


if __name__ == "__main__":
    main()
