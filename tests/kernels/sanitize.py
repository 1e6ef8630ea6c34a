"""Run every kernel once, on a GPU, under NVIDIA's compute-sanitizer:

    export PYTHONPATH=.:tests
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck python tests/kernels/sanitize.py

Without torch's caching allocator every tensor has its own allocation, so memcheck knows its bounds.
"""

import torch

from qwenvit import ops
from support.compile_ahead import call_everything


def main() -> None:
    torch.set_default_device("cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        call_everything(dtype)
        lengths = torch.tensor([0, 1, 0, 64, 5, 63, 100, 0], device="cpu")
        cu_seqlens = lengths.cumsum(0).to("cuda", torch.int32)
        for head_dim in (64, 72, 80):
            q, k, v = torch.randn(233, 3, 3, head_dim).to(dtype).unbind(1)
            for max_seqlen in (64, None):
                ops.rope_attention(q, k, v, None, None, cu_seqlens, max_seqlen)
            if dtype != torch.float32:  # on Hopper, tiles of one segment this long have queries of two heads
                q, k, v = torch.randn(3136, 3, 16, head_dim).to(dtype).unbind(1)
                ops.rope_attention(q, k, v, None, None, torch.tensor([0, 3136], dtype=torch.int32), None)
        torch.cuda.synchronize()
        print(f"{dtype}: every kernel ran")


if __name__ == "__main__":
    main()
