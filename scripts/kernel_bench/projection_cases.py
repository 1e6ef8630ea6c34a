"""Cases of matrix products with fused epilogues: QKV with RoPE, and the first half of an MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernel_inputs import Inputs
from kernel_bench.attention_cases import rope_fp64
from kernel_bench.cases import (
    ELEMENT_BYTES,
    Case,
    Implementation,
    Target,
    hidden_states,
    linear_weight,
    normal,
    to_fp64,
)
from peers.attention import split_qkv, torch_rope
from peers.torch_compile import compiled
from qwenvit import ops
from qwenvit.ops import reference
from qwenvit.ops.packing import adjacent_pairs, pack_qkv, split_packed_qkv, value_width

QKV_SHAPES = {  # model: channels, heads, head_dim, patch counts
    "Qwen2.5-VL": (1280, 16, 80, (1024, 2304, 4096, 9216, 16384)),
    "Qwen3-VL": (1152, 16, 72, (784, 1764, 3136, 7056, 16384)),
    "Qwen3-VL small": (1024, 16, 64, (784, 1764, 3136, 7056, 16384)),
}
MLP_SHAPES = {  # model: activation, channels, intermediate channels (padded), patch counts
    "Qwen2.5-VL": ("swiglu", 1280, 3456, (1024, 4096, 9216)),
    "Qwen2-VL": ("quick_gelu", 1280, 5120, (1024, 4096, 9216)),
    "Qwen3-VL": ("gelu_tanh", 1152, 4304, (784, 3136, 7056)),
    "Qwen3-VL small": ("gelu_tanh", 1024, 4096, (784, 3136, 7056)),
}


def qkv_case(model: str, tokens: int, channels: int, heads: int, head_dim: int) -> Case:
    """Return the case of the QKV projection with RoPE.

    `fused` is the fused kernel; `dispatch` is the operation, which chooses between it and cuBLAS with a RoPE pass. At
    head_dim 72 it also writes the ones that attention on Hopper needs beside V, since the towers' weight leaves room
    for them (`pack_qkv`). `fused` then runs the kernel that copies V's last channels beside ones, as does `V copied`,
    which is cuBLAS with a RoPE pass otherwise. Rivals need no ones.
    """
    width = 3 * heads * head_dim

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        weight, bias = linear_weight(width, channels, device, dtype), normal(width, device=device, dtype=dtype)
        packed_weight, packed_bias = pack_qkv(weight, bias, heads)
        order = adjacent_pairs(heads, head_dim, device)
        angles = torch.rand(tokens, head_dim // 2, device=device).mul(100).repeat(1, 2)
        x = {"x": hidden_states(tokens, channels, device, dtype), "cos": angles.cos(), "sin": angles.sin()}
        x |= {"weight": weight, "bias": bias, "packed_weight": packed_weight, "packed_bias": packed_bias}
        return x | {"permuted_weight": weight[order], "permuted_bias": bias[order]}

    def add_ones(qkv: Tensor) -> Tensor:
        from qwenvit.kernels.attention.pad_values import pad_with_ones

        if value_width(head_dim) > head_dim:
            pad_with_ones(split_qkv(qkv, heads)[2][..., 64:])
        return qkv

    def run_fused(x: Inputs) -> Tensor:
        from qwenvit.kernels.gemm.qkv_rope import project_and_rotate

        operands = x["x"], x["permuted_weight"], x["permuted_bias"], x["cos"], x["sin"]
        return add_ones(project_and_rotate(*operands, heads))

    def run_dispatch(x: Inputs) -> Tensor:
        return ops.qkv_rope(x["x"], x["packed_weight"], x["packed_bias"], x["cos"], x["sin"], heads)

    def run_cublas_and_triton(x: Inputs) -> Tensor:
        qkv = F.linear(x["x"], x["permuted_weight"], x["permuted_bias"])
        return ops.rotate_qk_(qkv, x["cos"], x["sin"], heads, impl="triton")

    def run_cublas_and_torch(x: Inputs) -> tuple[Tensor, ...]:
        return torch_rope(F.linear(x["x"], x["weight"], x["bias"]), x["cos"], x["sin"], heads)

    def to_packed_channels(parts: tuple[Tensor, ...]) -> Tensor:
        order = adjacent_pairs(heads, head_dim, parts[0].device)
        return torch.stack(parts, 1).flatten(1)[:, order]

    def without_ones(packed: Tensor) -> Tensor:
        return torch.cat([x[..., :head_dim].flatten(1) for x in split_packed_qkv(packed, heads, head_dim)], 1)

    def truth(x: Inputs) -> Tensor:
        x = to_fp64(x)
        q, k, v = split_qkv(F.linear(x["x"], x["weight"], x["bias"]), heads)
        return to_packed_channels((rope_fp64(q, x["cos"], x["sin"]), rope_fp64(k, x["cos"], x["sin"]), v))

    triton_pass, torch_rival = "cuBLAS + Triton RoPE", "cuBLAS + torch RoPE"
    over_pass = Target(f"over {triton_pass}", lambda m: m.speedup("fused", triton_pass), 1.08)
    best = Target(
        "over the better of both", lambda m: m.speedup("dispatch", "fused", triton_pass), 0.98, any_kernel=True
    )
    over_torch = Target(f"over {torch_rival}", lambda m: m.speedup("dispatch", torch_rival), 1.2, any_kernel=True)
    elements = tokens * channels + width * channels + width + tokens * width
    angles = 4 * tokens * head_dim  # fp32; the second half of each row repeats the first and need not be read
    baseline = Implementation(run_cublas_and_torch, to_packed_channels)
    implementations = {"fused": Implementation(run_fused), "dispatch": Implementation(run_dispatch, without_ones)}
    if value_width(head_dim) > head_dim:
        implementations["V copied"] = Implementation(lambda x: add_ones(run_cublas_and_triton(x)))
    return Case(
        section="qkv",
        series=model,
        title=f"{model}, {channels} → {width}",
        tokens=tokens,
        head_dim=head_dim,
        make_inputs=make_inputs,
        implementations=implementations,
        rivals={triton_pass: Implementation(run_cublas_and_triton), torch_rival: baseline},
        truth=truth,
        baseline=baseline,
        minimum_bytes=elements * ELEMENT_BYTES + angles,
        pass_bytes={"_rotate_in_place": 4 * tokens * heads * head_dim * ELEMENT_BYTES},
        flops=2 * tokens * channels * width + 6 * tokens * heads * head_dim,
        targets={"fused": (over_pass,) if tokens >= 4096 else (), "dispatch": (best, over_torch)},
        lower_bounds={"bare cuBLAS": Implementation(lambda x: F.linear(x["x"], x["weight"], x["bias"]))},
    )


def mlp_case(model: str, act: str, tokens: int, channels: int, width: int) -> Case:
    """Return the case of an MLP's projection, bias and activation.

    For SwiGLU, qwenvit has gate and up in alternate columns. Rivals in torch have them as halves, which torch reads
    faster.
    """
    gated = act == "swiglu"
    columns = 2 * width if gated else width

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        weight, bias = linear_weight(columns, channels, device, dtype), normal(columns, device=device, dtype=dtype)
        x = {"x": hidden_states(tokens, channels, device, dtype), "weight": weight, "bias": bias}
        if gated:
            order = torch.arange(columns, device=device).view(2, width).T.flatten()
            x |= {"packed_weight": weight[order], "packed_bias": bias[order]}
        return x

    def packed(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return x["x"], x["packed_weight" if gated else "weight"], x["packed_bias" if gated else "bias"]

    def run_fused(x: Inputs) -> Tensor:
        from qwenvit.kernels.gemm.mlp import project_and_activate

        return project_and_activate(*packed(x), "silu" if gated else act, gated)

    def run_dispatch(x: Inputs) -> Tensor:
        return ops.swiglu(*packed(x)) if gated else ops.linear_act(*packed(x), act)

    def run_cublas_and_triton(x: Inputs) -> Tensor:
        out = F.linear(*packed(x))
        return ops.swiglu_pass(out, impl="triton") if gated else ops.activation_(out, act, impl="triton")

    def run_torch(x: Inputs) -> Tensor:
        out = F.linear(x["x"], x["weight"], x["bias"])
        if not gated:
            return reference.activation(out, act)
        gate, up = out.chunk(2, -1)
        return F.silu(gate) * up

    triton_pass = "cuBLAS + Triton pass"
    rivals = {
        triton_pass: Implementation(run_cublas_and_triton),
        "torch": Implementation(run_torch),
        "torch.compile": Implementation(compiled(run_torch)),
    }
    if act == "gelu_tanh" and torch.cuda.is_available():  # on a CPU the epilogue computes the exact GELU
        rivals["cuBLASLt epilogue"] = Implementation(
            lambda x: torch._addmm_activation(x["bias"], x["x"], x["weight"].T, use_gelu=True)
        )
    best = Target(
        "over the better of both", lambda m: m.speedup("dispatch", "fused", triton_pass), 0.98, any_kernel=True
    )
    return Case(
        section="mlp",
        series=f"{model}, {act}",
        title=f"{model}, {act}, {channels} → {width}",
        tokens=tokens,
        head_dim=None,
        make_inputs=make_inputs,
        implementations={"fused": Implementation(run_fused), "dispatch": Implementation(run_dispatch)},
        rivals=rivals,
        truth=lambda x: run_torch(to_fp64(x)),
        baseline=Implementation(run_torch),
        minimum_bytes=(tokens * channels + columns * channels + columns + tokens * width) * ELEMENT_BYTES,
        pass_bytes={"_swiglu": 4 * tokens * width * ELEMENT_BYTES, "_activate": 2 * tokens * width * ELEMENT_BYTES},
        flops=2 * tokens * channels * columns,
        targets={"fused": (), "dispatch": (best,)},
        lower_bounds={"bare cuBLAS": Implementation(lambda x: F.linear(x["x"], x["weight"], x["bias"]))},
    )


def projection_cases() -> list[Case]:
    """Return the cases of the sections `qkv` and `mlp`."""
    cases = [qkv_case(model, tokens, *shape) for model, (*shape, counts) in QKV_SHAPES.items() for tokens in counts]
    for model, (act, channels, width, counts) in MLP_SHAPES.items():
        cases += [mlp_case(model, act, tokens, channels, width) for tokens in counts]
    return cases
