"""Matrix products, and the QKV projection with rotary embedding."""

import torch.nn.functional as F
from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import check_matrix, check_projection, check_rotation, check_tensor
from qwenvit.ops.dispatch import use_triton


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """Return `x @ weight.T + bias`. 2·S·C·N FLOPs.

    I/O: reads S·C + N·C elements and writes S·N. `"triton"` means cuBLAS with few rows padded, so that a row's bits do
    not depend on S in 16 bits (`qwenvit.kernels.gemm.cublas`).

    Args:
        x: `[S, C]`, contiguous, bfloat16, float16 or float32.
        weight: `[N, C]` in the dtype of `x`, contiguous.
        bias: `[N]` in the dtype of `x`, or None.
        impl: `"triton"`, `"reference"` or `"auto"` (`"triton"` on a CUDA device).

    Returns:
        `[S, N]` in the dtype of `x`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `"triton"` is asked for gradients.
    """
    check_projection("x", x, weight, bias)
    if not use_triton(impl, x, weight, bias):
        return F.linear(x, weight, bias)
    from qwenvit.kernels.gemm import cublas

    return cublas.linear(x, weight, bias)


def add_linear_(total: Tensor, x: Tensor, weight: Tensor, impl: Impl = "auto") -> Tensor:
    """Add `x @ weight.T` to `total` in place. 2·S·C·N FLOPs.

    I/O: reads S·C + N·C + S·N elements and writes S·N. `"triton"` means cuBLAS with few rows padded, so that a row's
    bits do not depend on S in 16 bits (`qwenvit.kernels.gemm.cublas`).

    Args:
        total: `[S, N]`, contiguous, bfloat16, float16 or float32. Overwritten.
        x: `[S, C]` in the dtype of `total`, contiguous.
        weight: `[N, C]` in the dtype of `total`, contiguous.
        impl: `"triton"`, `"reference"` or `"auto"` (`"triton"` on a CUDA device).

    Returns:
        `total`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `"triton"` is asked for gradients.
    """
    check_projection("x", x, weight, None)
    check_tensor("total", total, (x.shape[0], weight.shape[0]), x.dtype, x)
    if not use_triton(impl, x, weight, total):
        return total.addmm_(x, weight.T)
    from qwenvit.kernels.gemm import cublas

    return cublas.add_linear_(total, x, weight)


def qkv_rope(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    interleaved: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Project to packed Q, K and V, and rotate Q and K in fp32 (2-D RoPE: `qwenvit.plan.rope`). 6·S·C·H·D FLOPs.

    16-bit tensors with `interleaved=True`, few channels and heads of V as wide as those of Q use one fused kernel on
    sm_90 (`qwenvit.kernels.gemm.qkv_rope`). It reads S·C + 3·H·D·C elements and half of each row of `cos` and `sin`,
    writes 3·S·H·D elements, and rotates before it rounds. All other cases use cuBLAS and one in-place pass over Q and
    K, which moves 4·S·H·D elements more. With `"triton"` a row's bits do not depend on S in 16 bits.

    Args:
        hidden_states: `[S, C]`, contiguous, bfloat16, float16 or float32.
        weight: `[N, C]` in the dtype of `hidden_states`, contiguous: rows of Q, then K, then V. N is 3·H·D, or with
            D = 72 also 2·H·72 + H·80. For `interleaved=True`, the weight that `qwenvit.packing.pack_qkv` returns.
        bias: `[N]` in the dtype of `hidden_states`, or None.
        cos: cosines `[S, D]` fp32, contiguous, with equal halves in each row.
        sin: sines `[S, D]` fp32, contiguous, with equal halves in each row.
        num_heads: H.
        interleaved: True if a rotary pair is channels 2i and 2i + 1 of a head, False if it is channels i and i + D / 2.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[S, N]` in the dtype of `hidden_states`. Heads of V of 80 channels end in ones.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `"triton"` is asked for gradients.
    """
    check_projection("hidden_states", hidden_states, weight, bias)
    check_rotation("weight", weight.shape[0], cos, sin, num_heads, hidden_states)
    if not use_triton(impl, hidden_states, weight, bias, cos, sin):
        return reference.qkv_rope(hidden_states, weight, bias, cos, sin, num_heads, interleaved)
    from qwenvit.kernels.gemm.qkv_rope import qkv_rope_op

    return qkv_rope_op(hidden_states, weight, bias, cos, sin, num_heads, interleaved)


def rotate_qk_(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool = True, impl: Impl = "auto"
) -> Tensor:
    """Rotate Q and K of packed Q, K and V in place, in fp32, and write ones beside V if there is room for them.

    I/O: reads and writes 2·S·H·D elements, reads half of each row of `cos` and `sin` (4·S·D bytes), and writes the
    ones. 6·S·H·D FLOPs.

    Args:
        qkv: `[S, N]`, contiguous, bfloat16, float16 or float32: Q, then K, each `[H, D]`, then V, `[H, D]` or, with
            D = 72, `[H, 80]`, whose last 8 channels become ones. Overwritten.
        cos: cosines `[S, D]` fp32, contiguous, with equal halves in each row.
        sin: sines `[S, D]` fp32, contiguous, with equal halves in each row.
        num_heads: H.
        interleaved: True if a rotary pair is channels 2i and 2i + 1 of a head, False if it is channels i and i + D / 2.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `qkv`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `"triton"` is asked for gradients.
    """
    check_matrix("qkv", qkv)
    check_rotation("qkv", qkv.shape[1], cos, sin, num_heads, qkv)
    if not use_triton(impl, qkv, cos, sin):
        return reference.rotate_qk_(qkv, cos, sin, num_heads, interleaved)
    from qwenvit.kernels.gemm.qkv_rope import rotate_qk_op

    rotate_qk_op(qkv, cos, sin, num_heads, interleaved)
    return qkv
