"""2-D rotary position embedding of the vision tower.

A patch's row rotates half of a head's channel pairs, its column the other half (Qwen2-VL, arXiv:2409.12191, section
2.1; RoPE itself: arXiv:2104.09864). Channels i and i + head_dim / 2 are a pair.
"""

import torch
from torch import Tensor


def rope_cos_sin(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute the cosine and sine of every channel's angle.

    Args:
        position_ids: `[patches, 2]` int64, the row and column of each patch.
        head_dim: channels per head, a multiple of 4.
        theta: base of the frequencies, `rope_theta` in configs.

    Returns:
        Two `[patches, head_dim]` fp32 tensors on the device of `position_ids`.
    """
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device="cpu") / (head_dim // 2)
    inv_freq = (1.0 / theta**exponents).to(position_ids.device)  # the CPU's bits on every device
    angles = (position_ids[..., None].float() * inv_freq).flatten(1)  # the row's angles, then the column's
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys in fp32.

    Args:
        x: `[patches, heads, head_dim]` in any floating dtype.
        cos: `[patches, head_dim]` fp32.
        sin: `[patches, head_dim]` fp32.

    Returns:
        `[patches, heads, head_dim]` in the dtype of `x`.
    """
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    partner = torch.cat((-second, first), dim=-1)
    return (wide * cos[:, None] + partner * sin[:, None]).to(x.dtype)
