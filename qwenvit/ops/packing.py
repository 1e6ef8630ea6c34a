"""Weights as the kernels want them: rows reordered or zero rows added, once, at load time. The function is unchanged.

The functions take and give tensors in the layout of `torch.nn.Linear`: weights `[out, in]`, biases `[out]`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 128
"""Widths are padded to whole tiles of the GEMMs, which also aligns rows to 16 bytes: unaligned, they cost 3.4 times."""


def adjacent_pairs(num_heads: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Where the channels of packed Q, K and V come from when rotary pairs become neighbours in Q and K.

    Channels i and i + head_dim / 2 of a head go to 2i and 2i + 1. The same order in Q and K leaves every score as it
    was; V keeps its own.

    Returns:
        `[3·num_heads·head_dim]` int64: `weight[order]` is the packed weight.
    """
    rows = torch.arange(3 * num_heads * head_dim, device=device).view(3, num_heads, 2, head_dim // 2)
    return torch.cat((rows[:2].transpose(2, 3).flatten(), rows[2].flatten()))


def pack_qkv(weight: Tensor, bias: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor | None]:
    """QKV projection whose output has rotary pairs adjacent in Q and K (`interleaved=True` of the kernels).

    Args:
        weight: `[3·num_heads·head_dim, in]`, Q above K above V.
        bias: `[3·num_heads·head_dim]` or None.
        num_heads: heads of each.

    Raises:
        ValueError: the rows do not split into three times `num_heads` heads of an even width.
    """
    rows = weight.shape[0]
    if rows % (6 * num_heads):
        raise ValueError(f"weight: expected rows of Q, K and V in {num_heads} heads of an even width, got {rows} rows")
    order = adjacent_pairs(num_heads, rows // (3 * num_heads), weight.device)
    return weight[order], None if bias is None else bias[order]


def pack_gate_up(
    gate_weight: Tensor, gate_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One projection for SwiGLU: row 2i is the gate's row i and row 2i + 1 the up projection's, zero-padded.

    A padded channel is silu(0) · 0 = 0; `pad_columns` gives the down projection as many columns.

    Args:
        gate_weight: `[intermediate, in]`.
        gate_bias: `[intermediate]`; None for no biases.
        up_weight: `[intermediate, in]`.
        up_bias: `[intermediate]`; None for no biases.

    Returns:
        Weight `[2·padded, in]` and bias `[2·padded]`, `padded` being the next multiple of 128.

    Raises:
        ValueError: gate and up differ in shape, or one alone has a bias.
    """
    if gate_weight.shape != up_weight.shape:
        raise ValueError(f"up_weight: expected the gate's shape {list(gate_weight.shape)}, got {list(up_weight.shape)}")
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("up_bias: expected a bias in both of gate and up, or in neither")
    pad = -gate_weight.shape[0] % LANES
    weight = F.pad(torch.stack((gate_weight, up_weight), dim=1), (0, 0, 0, 0, 0, pad)).flatten(0, 1)
    if gate_bias is None or up_bias is None:
        return weight, None
    return weight, F.pad(torch.stack((gate_bias, up_bias), dim=1), (0, 0, 0, pad)).flatten()


def pad_columns(weight: Tensor, multiple: int = LANES) -> Tensor:
    """`[out, in]` -> `[out, padded]`: zero columns up to a multiple, for the inputs that `pack_gate_up` added."""
    return F.pad(weight, (0, -weight.shape[1] % multiple))
