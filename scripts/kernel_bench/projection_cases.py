"""Cases of matrix products with something around them: QKV with RoPE, and the MLP's first half."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.attention_cases import exact_rope
from kernel_bench.cases import ITEM, Bar, Case, Run, doubles, hidden_states, linear_weight, normal
from kernel_bench.timing import Inputs
from peers.attention import split, torch_rope
from peers.torch_compile import compiled
from qwenvit import ops
from qwenvit.ops import reference
from qwenvit.ops.packing import adjacent_pairs, pack_qkv

QKV = {  # model: channels, heads, head_dim, patch counts
    "Qwen2.5-VL": (1280, 16, 80, (1024, 2304, 4096, 9216, 16384)),
    "Qwen3-VL": (1152, 16, 72, (784, 1764, 3136, 7056, 16384)),
    "Qwen3-VL small": (1024, 16, 64, (784, 1764, 3136, 7056, 16384)),
}
MLP = {  # model: activation, channels, intermediate channels (padded), patch counts
    "Qwen2.5-VL": ("swiglu", 1280, 3456, (1024, 4096, 9216)),
    "Qwen2-VL": ("quick_gelu", 1280, 5120, (1024, 4096, 9216)),
    "Qwen3-VL": ("gelu_tanh", 1152, 4304, (784, 3136, 7056)),
    "Qwen3-VL small": ("gelu_tanh", 1024, 4096, (784, 3136, 7056)),
}


def qkv_case(model: str, tokens: int, channels: int, heads: int, head_dim: int) -> Case:
    """The fused kernel, and the operation that chooses between it and cuBLAS with a pass."""
    width = 3 * heads * head_dim

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        weight, bias = linear_weight(width, channels, device, dtype), normal(width, device=device, dtype=dtype)
        packed_weight, packed_bias = pack_qkv(weight, bias, heads)
        angles = torch.rand(tokens, head_dim // 2, device=device).mul(100).repeat(1, 2)
        x = {"x": hidden_states(tokens, channels, device, dtype), "cos": angles.cos(), "sin": angles.sin()}
        return x | {"weight": weight, "bias": bias, "packed_weight": packed_weight, "packed_bias": packed_bias}

    def fused(x: Inputs) -> Tensor:
        from qwenvit.kernels.gemm.qkv_rope import project_and_rotate

        return project_and_rotate(x["x"], x["packed_weight"], x["packed_bias"], x["cos"], x["sin"], heads)

    def dispatch(x: Inputs) -> Tensor:
        return ops.qkv_rope(x["x"], x["packed_weight"], x["packed_bias"], x["cos"], x["sin"], heads)

    def cublas_and_pass(x: Inputs) -> Tensor:
        qkv = F.linear(x["x"], x["packed_weight"], x["packed_bias"])
        return ops.rotate_qk_(qkv, x["cos"], x["sin"], heads, impl="triton")

    def cublas_and_torch(x: Inputs) -> tuple[Tensor, ...]:
        return torch_rope(F.linear(x["x"], x["weight"], x["bias"]), x["cos"], x["sin"], heads)

    def adjacent(parts: tuple[Tensor, ...]) -> Tensor:
        order = adjacent_pairs(heads, head_dim, parts[0].device)
        return torch.stack(parts, 1).flatten(1)[:, order]

    def truth(x: Inputs) -> Tensor:
        wide = doubles(x)
        q, k, v = split(F.linear(wide["x"], wide["weight"], wide["bias"]), heads)
        return adjacent((exact_rope(q, x["cos"], x["sin"]), exact_rope(k, x["cos"], x["sin"]), v))

    by_pass, by_torch = "cuBLAS + Triton RoPE", "cuBLAS + torch RoPE"
    fewest = (tokens * channels + width * channels + width + tokens * width) * ITEM + 4 * tokens * head_dim
    over_pass = Bar(f"over {by_pass}", lambda f: f.over("fused", by_pass), 1.08)
    best = Bar("over the better of both", lambda f: f.over("dispatch", "fused", by_pass), 0.98, any_kernel=True)
    over_torch = Bar(f"over {by_torch}", lambda f: f.over("dispatch", by_torch), 1.2, any_kernel=True)
    return Case(
        section="qkv",
        series=model,
        title=f"{model}, {channels} → {width}",
        tokens=tokens,
        head_dim=head_dim,
        inputs=inputs,
        ours={"fused": Run(fused), "dispatch": Run(dispatch)},
        rivals={by_pass: Run(cublas_and_pass), by_torch: Run(cublas_and_torch, adjacent)},
        truth=truth,
        stick=Run(cublas_and_torch, adjacent),
        fewest_bytes=fewest,
        pass_bytes={"_rotate_in_place": 4 * tokens * heads * head_dim * ITEM},
        flops=2 * tokens * channels * width + 6 * tokens * heads * head_dim,
        bars={"fused": (over_pass,) if tokens >= 4096 else (), "dispatch": (best, over_torch)},
        floors={"bare cuBLAS": Run(lambda x: F.linear(x["x"], x["weight"], x["bias"]))},
    )


def mlp_case(model: str, act: str, tokens: int, channels: int, width: int) -> Case:
    """Projection, bias and activation; SwiGLU's torch rivals have gate and up as halves, which torch reads faster."""
    gated = act == "swiglu"
    columns = 2 * width if gated else width

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        weight, bias = linear_weight(columns, channels, device, dtype), normal(columns, device=device, dtype=dtype)
        x = {"x": hidden_states(tokens, channels, device, dtype), "weight": weight, "bias": bias}
        if gated:
            order = torch.arange(columns, device=device).view(2, width).T.flatten()
            x |= {"packed_weight": weight[order], "packed_bias": bias[order]}
        return x

    def packed(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return x["x"], x["packed_weight" if gated else "weight"], x["packed_bias" if gated else "bias"]

    def fused(x: Inputs) -> Tensor:
        from qwenvit.kernels.gemm.mlp import project_and_activate

        return project_and_activate(*packed(x), "silu" if gated else act, gated)

    def dispatch(x: Inputs) -> Tensor:
        return ops.swiglu(*packed(x)) if gated else ops.linear_act(*packed(x), act)

    def cublas_and_pass(x: Inputs) -> Tensor:
        out = F.linear(*packed(x))
        return ops.swiglu_pass(out, impl="triton") if gated else ops.activation_(out, act, impl="triton")

    def plain(x: Inputs) -> Tensor:
        out = F.linear(x["x"], x["weight"], x["bias"])
        if not gated:
            return reference.activation(out, act)
        gate, up = out.chunk(2, -1)
        return F.silu(gate) * up

    by_pass, by_torch, by_compile = "cuBLAS + Triton pass", "torch", "torch.compile"
    rivals = {by_pass: Run(cublas_and_pass), by_torch: Run(plain), by_compile: Run(compiled(plain))}
    if act == "gelu_tanh" and torch.cuda.is_available():  # cuBLASLt's own epilogue; on a CPU it is the exact GELU
        rivals["cuBLASLt epilogue"] = Run(
            lambda x: torch._addmm_activation(x["bias"], x["x"], x["weight"].T, use_gelu=True)
        )
    best = Bar("over the better of both", lambda f: f.over("dispatch", "fused", by_pass), 0.98, any_kernel=True)
    return Case(
        section="mlp",
        series=f"{model}, {act}",
        title=f"{model}, {act}, {channels} → {width}",
        tokens=tokens,
        head_dim=None,
        inputs=inputs,
        ours={"fused": Run(fused), "dispatch": Run(dispatch)},
        rivals=rivals,
        truth=lambda x: plain(doubles(x)),
        stick=Run(plain),
        fewest_bytes=(tokens * channels + columns * channels + columns + tokens * width) * ITEM,
        pass_bytes={"_swiglu": 4 * tokens * width * ITEM, "_activate": 2 * tokens * width * ITEM},
        flops=2 * tokens * channels * columns,
        bars={"fused": (), "dispatch": (best,)},
        floors={"bare cuBLAS": Run(lambda x: F.linear(x["x"], x["weight"], x["bias"]))},
    )


def projection_cases() -> list[Case]:
    cases = [qkv_case(model, tokens, *shape) for model, (*shape, sizes) in QKV.items() for tokens in sizes]
    for model, (act, channels, width, sizes) in MLP.items():
        cases += [mlp_case(model, act, tokens, channels, width) for tokens in sizes]
    return cases
