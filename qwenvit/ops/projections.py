"""Operations around the tower's large matrix products: QKV with rotary embedding, and the first half of the MLP."""

from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import reference
from qwenvit.ops.checks import check_matrix, check_projection, check_rotation
from qwenvit.ops.dispatch import use_triton


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
    """Packed QKV projection with Q and K rotated, in fp32 angles (2-D RoPE: `qwenvit.plan.rope`).

    16-bit tensors with `interleaved=True` go through one kernel where it wins (see `qwenvit.kernels.gemm.qkv_rope`): it
    reads S·C + 3·H·D·C elements and S·D fp32 angles, writes S·3·H·D elements, and rotates before rounding. Others go
    through cuBLAS and one pass in place over Q and K, which moves 4·S·H·D elements more. 6·S·C·H·D FLOPs.

    Args:
        hidden_states: `[S, C]`, contiguous, bfloat16, float16 or float32.
        weight: `[3·H·D, C]`, Q above K above V; for `interleaved=True` as `qwenvit.packing.pack_qkv` gives it.
        bias: `[3·H·D]`, or None.
        cos: `[S, D]` fp32, the second half of each row like the first.
        sin: same.
        num_heads: H.
        interleaved: rotary pairs are channels 2i and 2i + 1 of a head; False: i and i + D / 2.
        impl: `"triton"`, `"reference"` or `"auto"`.

    Returns:
        `[S, 3·H·D]` in the dtype of `hidden_states`.

    Raises:
        TypeError: another dtype than these.
        ValueError: shapes, dtypes, devices or strides that do not fit together.
    """
    check_projection("hidden_states", hidden_states, weight, bias)
    check_rotation("weight", weight.shape[0], cos, sin, num_heads, hidden_states)
    if not use_triton(impl, hidden_states):
        return reference.qkv_rope(hidden_states, weight, bias, cos, sin, num_heads, interleaved)
    from qwenvit.kernels.gemm.qkv_rope import qkv_rope_op

    return qkv_rope_op(hidden_states, weight, bias, cos, sin, num_heads, interleaved)


def rotate_qk_(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool = True, impl: Impl = "auto"
) -> Tensor:
    """Rotate Q and K of a packed projection in place. Moves 4·S·H·D elements and S·D fp32 angles; 6·S·H·D FLOPs.

    Args:
        qkv: `[S, 3·H·D]`, contiguous, bfloat16, float16 or float32; Q, K and V each as `[H, D]`.
        cos: `[S, D]` fp32, the second half of each row like the first.
        sin: same.
        num_heads: H.
        interleaved: rotary pairs are channels 2i and 2i + 1 of a head; False: i and i + D / 2.
        impl: `"triton"`, `"reference"` or `"auto"`.

    Returns:
        `qkv`.

    Raises:
        TypeError: another dtype than these.
        ValueError: shapes, dtypes, devices or strides that do not fit together.
    """
    check_matrix("qkv", qkv)
    check_rotation("qkv", qkv.shape[1], cos, sin, num_heads, qkv)
    if not use_triton(impl, qkv):
        return reference.rotate_qk_(qkv, cos, sin, num_heads, interleaved)
    from qwenvit.kernels.gemm.qkv_rope import rotate_qk_op

    rotate_qk_op(qkv, cos, sin, num_heads, interleaved)
    return qkv
