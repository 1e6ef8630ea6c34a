"""Weight layouts of the kernels: rows are reordered or padded with zeros at load time, and the tower's outputs stay.

Weights are `[out, in]` and biases `[out]`, as in `torch.nn.Linear`, before and after.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH_MULTIPLE = 128
"""Widths are padded to a multiple of this: whole GEMM tiles, and rows aligned to 16 bytes (TUNING.md)."""


def value_width(head_dim: int) -> int:
    """Return the channels of a head of V in a packed projection: 80 for a `head_dim` of 72, otherwise `head_dim`.

    The channels beyond `head_dim` are for ones, which `qwenvit.ops.rotate_qk_` writes. Attention on Hopper adds up its
    weights with them, in matrix products of 16 channels.
    """
    return 80 if head_dim == 72 else head_dim


def packed_width(num_heads: int, head_dim: int) -> int:
    """Return the channels of a packed projection: Q and K of `head_dim` a head, V of `value_width(head_dim)`."""
    return num_heads * (2 * head_dim + value_width(head_dim))


def split_packed_qkv(qkv: Tensor, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of a packed projection's output `[S, packed_width]`: Q and K `[S, H, D]`, V `[S, H, D or wider]`."""
    q_and_k, v = qkv.tensor_split([2 * num_heads * head_dim], dim=1)
    q, k = q_and_k.unflatten(1, (2, num_heads, head_dim)).unbind(1)
    return q, k, v.unflatten(1, (num_heads, -1))


def adjacent_pairs(num_heads: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the row order that makes the channels of a rotary pair adjacent in Q and K.

    Channels i and i + head_dim / 2 of a head move to 2i and 2i + 1. Scores do not change, since Q and K move alike. V
    keeps its order.

    Args:
        num_heads: heads of each of Q, K and V.
        head_dim: channels per head, even.
        device: where the result is created.

    Returns:
        `[3·num_heads·head_dim]` int64: `weight[order]` is the reordered weight of packed Q, K and V.
    """
    rows = torch.arange(3 * num_heads * head_dim, device=device).view(3, num_heads, 2, head_dim // 2)
    return torch.cat((rows[:2].transpose(2, 3).flatten(), rows[2].flatten()))


def pack_qkv(weight: Tensor, bias: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor | None]:
    """Reorder a QKV projection so that rotary pairs are adjacent in Q and K (`interleaved=True` in `qwenvit.ops`).

    Heads of V of 72 channels get 8 rows of zeros, which leave room beside the values (`value_width`).

    Args:
        weight: `[3·num_heads·head_dim, in]`: rows of Q, then K, then V.
        bias: `[3·num_heads·head_dim]`, or None.
        num_heads: heads of each of Q, K and V.

    Returns:
        Weight `[packed_width(num_heads, head_dim), in]`, its rows in the order of `adjacent_pairs`, and bias of as many
        rows, or None.

    Raises:
        ValueError: the rows are not Q, K and V of `num_heads` heads with an even head_dim.
    """
    rows = weight.shape[0]
    if rows % (6 * num_heads):
        raise ValueError(f"weight: expected rows of Q, K and V in {num_heads} heads of an even width, got {rows} rows")
    return pack_qkv_rows(weight, num_heads), None if bias is None else pack_qkv_rows(bias, num_heads)


def pack_qkv_rows(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder and pad a weight or bias as `pack_qkv` does: `[3·num_heads·head_dim, ...]` -> `[packed, ...]`."""
    head_dim = len(rows) // (3 * num_heads)
    q_and_k, v = rows[adjacent_pairs(num_heads, head_dim, rows.device)].tensor_split([2 * num_heads * head_dim])
    extra = value_width(head_dim) - head_dim
    v = F.pad(v.unflatten(0, (num_heads, head_dim)), (*[0, 0] * (rows.ndim - 1), 0, extra))
    return torch.cat((q_and_k, v.flatten(0, 1)))


def unpack_qkv_rows(packed: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Undo `pack_qkv_rows`: `[packed, ...]` -> `[3·num_heads·head_dim, ...]`."""
    q_and_k, v = packed.tensor_split([2 * num_heads * head_dim])
    v = v.unflatten(0, (num_heads, -1))[:, :head_dim].flatten(0, 1)
    return torch.cat((q_and_k, v))[adjacent_pairs(num_heads, head_dim, packed.device).argsort()]


def pack_gate_up(
    gate_weight: Tensor, gate_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Interleave the gate and up projections of SwiGLU: row 2i is row i of the gate, row 2i + 1 is row i of up.

    Zero rows pad the width to a multiple of 128. Padded channels are silu(0) · 0 = 0; `pad_columns` pads the down
    projection to match.

    Args:
        gate_weight: `[intermediate, in]`.
        gate_bias: `[intermediate]`, or None if neither projection has a bias.
        up_weight: `[intermediate, in]`.
        up_bias: `[intermediate]`, or None if neither projection has a bias.

    Returns:
        Weight `[2·padded, in]` and bias `[2·padded]` or None, where `padded` is `intermediate` rounded up to a multiple
        of 128.

    Raises:
        ValueError: gate and up have different shapes, or only one of them has a bias.
    """
    if gate_weight.shape != up_weight.shape:
        raise ValueError(f"up_weight: expected the gate's shape {list(gate_weight.shape)}, got {list(up_weight.shape)}")
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("up_bias: expected a bias in both of gate and up, or in neither")
    pad = -gate_weight.shape[0] % WIDTH_MULTIPLE
    weight = F.pad(torch.stack((gate_weight, up_weight), dim=1), (0, 0, 0, 0, 0, pad)).flatten(0, 1)
    if gate_bias is None or up_bias is None:
        return weight, None
    return weight, F.pad(torch.stack((gate_bias, up_bias), dim=1), (0, 0, 0, pad)).flatten()


def pad_columns(weight: Tensor, multiple: int = WIDTH_MULTIPLE) -> Tensor:
    """Append zero columns, `[out, in]` -> `[out, padded]`, where `padded` is `in` rounded up to a multiple.

    This fits the down projection to the channels that `pack_gate_up` adds, and aligns rows of a patch embedding.
    """
    return F.pad(weight, (0, -weight.shape[1] % multiple))
