"""Compile every kernel for a GPU that is not there, as its launcher would: `python compile_ahead.py sm_90`.

The operations are called as users call them, on CPU tensors, but Triton is told that a GPU of the given kind is
present and stops before each launch. Prints a JSON line for each kernel: name, shared memory and spilled bytes.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from qwenvit import ops
from qwenvit.config.published import PUBLISHED
from qwenvit.graphs.device_plan import grid_table
from qwenvit.kernels.gemm import tiles as gemm
from qwenvit.kernels.grid_plan import launch_grid_plan

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin"


class AbsentGPU:
    """The part of Triton's driver that compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def spilled_bytes(ptx: str, capability: int) -> int:
    arch = re.search(r"\.target (\w+)", ptx)[1]
    program = PTXAS / ("ptxas-blackwell" if capability >= 100 and (PTXAS / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [program, "-v", f"-arch={arch}", source, "-o", f"{folder}/kernel.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", report))


def call_everything(dtype: torch.dtype) -> None:
    """Each operation once for each kernel behind it, in the widths of the published towers."""

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    for head_dim in (64, 72, 80) if dtype == torch.bfloat16 else (80,):
        qkv = tensor(256, 3, 16, head_dim)
        angles = tensor(256, head_dim, of=torch.float32)
        bounds = torch.tensor([0, 64, 256], dtype=torch.int32)
        for longest in (64, None):
            for interleaved in (True, False):
                ops.rope_attention(*qkv.unbind(1), angles, angles, bounds, longest, None, interleaved, impl="triton")
            ops.rope_attention(*qkv.unbind(1), None, None, bounds, longest, impl="triton")
        width = 16 * head_dim
        packed = tensor(256, 3 * width)
        ops.rotate_qk_(packed, angles, angles, 16, impl="triton")
        if dtype != torch.float32:
            from qwenvit.kernels.gemm.qkv_rope import project_and_rotate

            project_and_rotate(tensor(256, width), tensor(3 * width, width), tensor(3 * width), angles, angles, 16)
        ops.add_norm(tensor(256, width), tensor(256, width), tensor(width), shift=tensor(width), impl="triton")
        ops.merge_norm(tensor(256, width), tensor(width), tensor(width), torch.arange(64), "layer", impl="triton")
    for mode in ("concat", "average"):
        ops.spatial_merge(tensor(16, 16, 1280), mode, impl="triton")
    for act in ("gelu_tanh", "quick_gelu", "gelu"):
        ops.activation_(tensor(256, 4304), act, impl="triton")
    ops.swiglu_pass(tensor(256, 6912), impl="triton")
    if dtype != torch.float32:
        from qwenvit.kernels.gemm.mlp import project_and_activate

        tile = gemm.TMA_TILE if gemm.uses_tma(tensor(1, 8)) else gemm.POINTER_TILE
        for act, gated in (("silu", True), ("gelu_tanh", False), ("quick_gelu", False)):
            project_and_activate(tensor(256, 1280), tensor(6912, 1280), tensor(6912), act, gated, tile)
    learned = tensor(2304, 1152), torch.zeros(256, 4, dtype=torch.int64), tensor(256, 4, of=torch.float32)
    ops.add_positions(tensor(256, 1152), *learned, impl="triton")
    for pixel_dtype in (dtype, torch.float32):  # cuBLAS and its passes
        pixels, weight = tensor(256, 1536, of=pixel_dtype), tensor(1152, 1536)
        ops.patch_embed(pixels, weight, tensor(1152), *learned, torch.arange(64), impl="triton")
    if dtype != torch.float32 and gemm.uses_tma(tensor(1, 8)):
        from qwenvit.kernels.gemm.patch_embed import embed_to_order

        embed_to_order(tensor(256, 1176), tensor(1280, 1216)[:, :1176], None, torch.arange(64), 4)
    angles = torch.zeros(64, 18)
    for name in ("qwen2_5_vl-7b", "qwen3_vl-8b"):
        config = PUBLISHED[name].config
        table = grid_table(torch.tensor([[1, 16, 16]], device="cpu"), config, 2).to(angles.device)
        side = 4 if config.window_size else 0
        launch_grid_plan(table, angles, angles, 256, 8, 16, 2, side, config.position_grid)
    types, grid = torch.zeros(2, 600, dtype=torch.int64), torch.ones(3, 3, dtype=torch.int64)
    for apart in (False, True):
        seconds = None if apart else tensor(3)
        ops.rope_index(types, 1, 2, types, grid, grid, seconds, 2, 2, apart, impl="triton")


def main() -> None:
    capability = int(sys.argv[1].removeprefix("sm_"))
    found = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: object, **options: object) -> None:
        compiled = run(kernel, *args, **options | {"warmup": True})
        found[compiled.hash] = (kernel.__name__, str(dtype), compiled)

    driver.set_active(AbsentGPU(capability))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(gemm, "capability", return_value=divmod(capability, 10)),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            call_everything(dtype)
    for name, dtype_name, compiled in found.values():
        spilled = spilled_bytes(compiled.asm["ptx"], capability)
        figures = {"kernel": name, "dtype": dtype_name, "shared": compiled.metadata.shared, "spilled": spilled}
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
