"""The first half of the MLP: projection and activation."""

from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import check, check_act, check_matrix, check_projection
from qwenvit.ops.dispatch import use_triton


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, impl: Impl = "auto") -> Tensor:
    """`act(x @ weight.T + bias)`.

    16-bit tensors go through one kernel where it wins (see `qwenvit.kernels.gemm.mlp`): it reads S·C + N·C elements and
    writes S·N. Others go through cuBLAS and one pass in place, 2·S·N elements more. 2·S·C·N FLOPs.

    Args:
        x: `[S, C]`, contiguous, bfloat16, float16 or float32.
        weight: `[N, C]`.
        bias: `[N]`, or None.
        act: `"gelu_tanh"`, `"quick_gelu"` (x · sigmoid(1.702 x)) or `"gelu"` (exact).
        impl: `"triton"`, `"reference"` or `"auto"`.

    Returns:
        `[S, N]` in the dtype of `x`.

    Raises:
        TypeError: another dtype than these.
        ValueError: unknown activation; shapes, dtypes, devices or strides that do not fit together.
    """
    check_projection("x", x, weight, bias)
    check_act(act)
    if not use_triton(impl, x):
        return reference.linear_act(x, weight, bias, act)
    from qwenvit.kernels.gemm.mlp import linear_act_op

    return linear_act_op(x, weight, bias, act)


def activation_(x: Tensor, act: str, impl: Impl = "auto") -> Tensor:
    """`act` of each element, in place: one read and one write of `x`, which must be a contiguous matrix.

    Raises:
        TypeError: another dtype than bfloat16, float16 or float32.
        ValueError: unknown activation, or not a contiguous matrix.
    """
    check_matrix("x", x)
    check_act(act)
    if not use_triton(impl, x):
        return reference.activation_(x, act)
    from qwenvit.kernels.gemm.mlp import activation_op

    activation_op(x, act)
    return x


def swiglu(x: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor | None, impl: Impl = "auto") -> Tensor:
    """silu(gate) · up of one projection with alternating rows (`qwenvit.packing.pack_gate_up`; arXiv:2002.05202).

    16-bit tensors go through one kernel where it wins (see `qwenvit.kernels.gemm.mlp`): it reads S·C + 2·I·C elements
    and writes S·I. Others go through cuBLAS and `swiglu_pass`, 4·S·I elements more. 4·S·C·I FLOPs.

    Args:
        x: `[S, C]`, contiguous, bfloat16, float16 or float32.
        gate_up_weight: `[2·I, C]`, row 2i the gate's row i and row 2i + 1 the up projection's.
        gate_up_bias: `[2·I]`, or None.
        impl: `"triton"`, `"reference"` or `"auto"`.

    Returns:
        `[S, I]` in the dtype of `x`.

    Raises:
        TypeError: another dtype than these.
        ValueError: shapes, dtypes, devices or strides that do not fit together.
    """
    check_projection("x", x, gate_up_weight, gate_up_bias, "gate_up_")
    check(gate_up_weight.shape[0] % 2 == 0, "gate_up_weight", "an even number of rows", gate_up_weight.shape[0])
    if not use_triton(impl, x):
        return reference.swiglu(x, gate_up_weight, gate_up_bias)
    from qwenvit.kernels.gemm.mlp import swiglu_op

    return swiglu_op(x, gate_up_weight, gate_up_bias)


def swiglu_pass(gate_up: Tensor, impl: Impl = "auto") -> Tensor:
    """`[S, 2·I]`, gate and up in alternate columns -> silu(gate) · up, `[S, I]`. Reads 2·S·I elements, writes S·I.

    Raises:
        TypeError: another dtype than bfloat16, float16 or float32.
        ValueError: not a contiguous matrix with an even number of columns.
    """
    check_matrix("gate_up", gate_up)
    check(gate_up.shape[1] % 2 == 0, "gate_up", "an even number of columns", gate_up.shape[1])
    if not use_triton(impl, gate_up):
        return reference.swiglu_pass(gate_up)
    from qwenvit.kernels.gemm.mlp import swiglu_pass_op

    return swiglu_pass_op(gate_up)
