"""The first half of the MLP: projection and activation, fused or one after the other."""

from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import check, check_act, check_matrix, check_projection
from qwenvit.ops.dispatch import use_triton


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, impl: Impl = "auto") -> Tensor:
    """Return `act(x @ weight.T + bias)`. 2·S·C·N FLOPs.

    16-bit tensors on sm_90 use one fused kernel, except with exact GELU (`qwenvit.kernels.gemm.mlp`): it reads
    S·C + N·C elements and writes S·N. All other cases use cuBLAS and one in-place pass, which moves 2·S·N more. With
    `"triton"` a row's bits do not depend on S in 16 bits.

    Args:
        x: `[S, C]`, contiguous, bfloat16, float16 or float32.
        weight: `[N, C]` in the dtype of `x`, contiguous.
        bias: `[N]` in the dtype of `x`, or None.
        act: `"gelu_tanh"` (GELU's tanh approximation), `"quick_gelu"` (x · sigmoid(1.702 x)) or `"gelu"` (exact).
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[S, N]` in the dtype of `x`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: `act` is unknown; shapes, devices or strides do not fit together; `"triton"` is asked for gradients.
    """
    check_projection("x", x, weight, bias)
    check_act(act)
    if not use_triton(impl, x, weight, bias):
        return reference.linear_act(x, weight, bias, act)
    from qwenvit.kernels.gemm.mlp import linear_act_op

    return linear_act_op(x, weight, bias, act)


def activation_(x: Tensor, act: str, impl: Impl = "auto") -> Tensor:
    """Apply an activation to each element in place. I/O: reads x once, writes it once.

    Args:
        x: `[S, N]`, contiguous, bfloat16, float16 or float32. Overwritten.
        act: `"gelu_tanh"` (GELU's tanh approximation), `"quick_gelu"` (x · sigmoid(1.702 x)) or `"gelu"` (exact).
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `x`.

    Raises:
        TypeError: `x` has another type or dtype.
        ValueError: `act` is unknown; `x` is no contiguous matrix; `"triton"` is asked for gradients.
    """
    check_matrix("x", x)
    check_act(act)
    if not use_triton(impl, x):
        return reference.activation_(x, act)
    from qwenvit.kernels.gemm.mlp import activation_op

    activation_op(x, act)
    return x


def swiglu(x: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor | None, impl: Impl = "auto") -> Tensor:
    """Project to gate and up, and return silu(gate) · up (SwiGLU, arXiv:2002.05202). 4·S·C·I FLOPs.

    16-bit tensors on sm_90 use one fused kernel (`qwenvit.kernels.gemm.mlp`): it reads S·C + 2·I·C elements and writes
    S·I. All other cases use cuBLAS and `swiglu_pass`, which move 4·S·I elements more. With `"triton"` a row's bits do
    not depend on S in 16 bits.

    Args:
        x: `[S, C]`, contiguous, bfloat16, float16 or float32.
        gate_up_weight: `[2·I, C]` in the dtype of `x`, contiguous: row 2i is row i of the gate projection, row 2i + 1
            is row i of the up projection (`qwenvit.packing.pack_gate_up`).
        gate_up_bias: `[2·I]` in the dtype of `x`, in the order of the weight's rows, or None.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[S, I]` in the dtype of `x`.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes, devices or strides do not fit together; `"triton"` is asked for gradients.
    """
    check_projection("x", x, gate_up_weight, gate_up_bias, "gate_up_")
    check(gate_up_weight.shape[0] % 2 == 0, "gate_up_weight", "an even number of rows", gate_up_weight.shape[0])
    if not use_triton(impl, x, gate_up_weight, gate_up_bias):
        return reference.swiglu(x, gate_up_weight, gate_up_bias)
    from qwenvit.kernels.gemm.mlp import swiglu_op

    return swiglu_op(x, gate_up_weight, gate_up_bias)


def swiglu_pass(gate_up: Tensor, impl: Impl = "auto") -> Tensor:
    """Return silu(gate) · up of gate and up in alternating columns. I/O: reads 2·S·I elements, writes S·I.

    Args:
        gate_up: `[S, 2·I]`, contiguous, bfloat16, float16 or float32: column 2i is gate i, column 2i + 1 is up i.
        impl: `"triton"`, `"reference"` or `"auto"` (Triton on a CUDA device).

    Returns:
        `[S, I]` in the dtype of `gate_up`.

    Raises:
        TypeError: `gate_up` has another type or dtype.
        ValueError: `gate_up` is no contiguous matrix with an even number of columns; `"triton"` is asked for gradients.
    """
    check_matrix("gate_up", gate_up)
    check(gate_up.shape[1] % 2 == 0, "gate_up", "an even number of columns", gate_up.shape[1])
    if not use_triton(impl, gate_up):
        return reference.swiglu_pass(gate_up)
    from qwenvit.kernels.gemm.mlp import swiglu_pass_op

    return swiglu_pass_op(gate_up)
