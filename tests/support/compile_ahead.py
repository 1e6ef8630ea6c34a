"""Compile every kernel for a GPU architecture without such a GPU: `python compile_ahead.py sm_90 [DTYPE …]`.

Call each operation on CPU tensors, with a Triton driver that reports a GPU of the architecture and with launches
replaced by compilation. Print a JSON line for each compiled kernel: `compile_calls` says what is in it.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from qwenvit import ops
from qwenvit.config.published import PUBLISHED
from qwenvit.graphs.device_plan import grid_table
from qwenvit.kernels.gemm import tiles
from qwenvit.kernels.grid_plan import launch_grid_plan
from qwenvit.ops.packing import packed_width, split_packed_qkv
from support.ptxas import compile_with_report


class AbsentGPU:
    """The part of a Triton driver that compiling needs, for a compute capability of 80, 90 or 100."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_calls(capability: int, call: Callable[[], None]) -> list[dict[str, Any]]:
    """Call `call` with launches replaced by compilation for a GPU of the capability; describe each compiled kernel.

    A description has the kernel's name, bytes of shared memory, bytes that ptxas spills, ptxas' report, whether
    multiplications and additions are contracted, the named barriers that Triton uses, and a digest of the PTX.
    """
    rows = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: object, **options: object) -> None:
        compiled, report = compile_with_report(lambda: run(kernel, *args, **options | {"warmup": True}))
        ptx = compiled.asm["ptx"]
        if compiled.hash not in rows:
            rows[compiled.hash] = {
                "kernel": kernel.__name__,
                "shared": compiled.metadata.shared,
                "spilled": sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", report)),
                "fp_fusion": compiled.metadata.enable_fp_fusion,
                "barriers": sorted({int(number) for number in re.findall(r"\bbar(?:rier)?\.sync\s+(\d+)", ptx)}),
                "ptx": hashlib.sha256(ptx.encode()).hexdigest(),
                "report": report,
            }

    driver.set_active(AbsentGPU(capability))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tiles, "capability", return_value=divmod(capability, 10)),
    ):
        call()
    return list(rows.values())


def call_everything(dtype: torch.dtype) -> None:
    """Call every kernel at least once, through its operation where possible, in widths of the published towers."""

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    for head_dim in (64, 72, 80) if dtype == torch.bfloat16 else (80,):
        qkv = zeros(256, 3, 16, head_dim)
        angles = zeros(256, head_dim, dtype=torch.float32)
        cu_seqlens = torch.tensor([0, 64, 256], dtype=torch.int32)
        for max_seqlen in (64, None):
            for interleaved in (True, False):
                ops.rope_attention(
                    *qkv.unbind(1), angles, angles, cu_seqlens, max_seqlen, None, interleaved, impl="triton"
                )
            half = angles[:, : head_dim // 2].to(dtype).contiguous()  # as vLLM's towers have them
            ops.rope_attention(*qkv.unbind(1), half, half, cu_seqlens, max_seqlen, impl="triton")
            ops.rope_attention(*qkv.unbind(1), None, None, cu_seqlens, max_seqlen, impl="triton")
        if head_dim == 72 and dtype != torch.float32:
            from qwenvit.kernels.attention.pad_values import pad_with_ones

            pad_with_ones(qkv[:, 2, :, 64:])
        width = 16 * head_dim
        packed = zeros(256, packed_width(16, head_dim))
        ops.rotate_qk_(packed, angles, angles, 16, impl="triton")
        ops.rope_attention(*split_packed_qkv(packed, 16, head_dim), None, None, cu_seqlens, impl="triton")
        if dtype != torch.float32:
            from qwenvit.kernels.gemm.qkv_rope import project_and_rotate

            project_and_rotate(zeros(256, width), zeros(3 * width, width), zeros(3 * width), angles, angles, 16)
        ops.add_norm(zeros(256, width), zeros(256, width), zeros(width), shift=zeros(width), impl="triton")
        ops.merge_norm(zeros(256, width), zeros(width), zeros(width), torch.arange(64), "layer", impl="triton")
    ops.clone_rows([zeros(64, 4608), *[zeros(64, 4096)] * 4], 64, impl="triton")
    for mode in ("concat", "average"):
        ops.spatial_merge(zeros(16, 16, 1280), mode, impl="triton")
    for act in ("gelu_tanh", "quick_gelu", "gelu"):
        ops.activation_(zeros(256, 4304), act, impl="triton")
    ops.swiglu_pass(zeros(256, 6912), impl="triton")
    if dtype != torch.float32:
        from qwenvit.kernels.gemm.mlp import project_and_activate

        tile = tiles.TMA_TILE if tiles.uses_tma(zeros(1, 8)) else tiles.POINTER_TILE
        for act, gated in (("silu", True), ("gelu_tanh", False), ("quick_gelu", False)):
            project_and_activate(zeros(256, 1280), zeros(6912, 1280), zeros(6912), act, gated, tile)
    positions = zeros(2304, 1152), torch.zeros(256, 4, dtype=torch.int64), zeros(256, 4, dtype=torch.float32)
    ops.add_positions(zeros(256, 1152), *positions, impl="triton")
    for pixel_dtype in (dtype, torch.float32):  # cuBLAS, after passes over positions and pixels
        pixels, weight = zeros(256, 1536, dtype=pixel_dtype), zeros(1152, 1536)
        ops.patch_embed(pixels, weight, zeros(1152), *positions, torch.arange(64), impl="triton")
    for count, patch_size, vertical_first in ((1, 14, False), (1, 16, True), (2, 14, True), (2, 16, False)):
        frames, levels = zeros(count, 120, 160, 3, dtype=torch.uint8), zeros(3, 256)
        sizes = {"patch_size": patch_size, "temporal_patch_size": 2, "merge_size": 2, "vertical_first": vertical_first}
        for layout in (frames.permute(0, 3, 1, 2), zeros(count, 3, 120, 160, dtype=torch.uint8)):
            ops.resize_patches(layout, 4 * patch_size, 6 * patch_size, levels, rule="torch", **sizes, impl="triton")
    angles = torch.zeros(64, 18)
    for name in ("qwen2_5_vl-7b", "qwen3_vl-8b"):
        config = PUBLISHED[name].config
        table = grid_table(torch.tensor([[1, 16, 16]], device="cpu"), config, 2).to(angles.device)
        window_side = 4 if config.window_size else 0
        launch_grid_plan(table, angles, angles, 256, 8, 16, 2, window_side, config.position_grid)
    tokens, grid_thw = torch.zeros(2, 600, dtype=torch.int64), torch.ones(3, 3, dtype=torch.int64)
    for frames_apart in (False, True):
        seconds = None if frames_apart else zeros(3)
        ops.rope_index(tokens, 1, 2, tokens, grid_thw, grid_thw, seconds, 2, 2, frames_apart, impl="triton")


def main() -> None:
    capability = int(sys.argv[1].removeprefix("sm_"))
    for dtype in sys.argv[2:] or ("bfloat16", "float32"):
        for row in compile_calls(capability, lambda dtype=dtype: call_everything(getattr(torch, dtype))):
            print(json.dumps({"dtype": dtype, **row}))


if __name__ == "__main__":
    main()
