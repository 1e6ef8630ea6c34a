"""The operations of `qwenvit.ops` in plain torch: they define the results, on any device, and are not tuned for speed.

Shapes: S tokens, C input channels, N output channels, I channels inside the MLP, H heads of head_dim D.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.resampling import ResizePlan
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.rope import apply_rope

ACTIVATIONS = ("gelu_tanh", "quick_gelu", "gelu")
"""Values of `act` in `qwenvit.ops.linear_act` and `activation_`."""
_FRAMES, _PATCHES = "(t tp) c (h mh ph) (w mw pw)", "(t h w mh mw) c (tp ph pw)"
"""Axes of frames and of their patches, in einops' notation."""


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate heads `[S, heads, D]` by angles `[S, D]`, in fp32 whatever their dtype."""
    if not interleaved:
        return apply_rope(x, cos, sin)
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # pairs (2i, 2i + 1) to (i, i + D / 2)
    return apply_rope(halves, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def rotate_qk(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    """Rotate Q and K of packed Q, K and V by angles `[S, D]`, in fp32: `[S, N]` -> `[S, N]`, with ones beyond V's D."""
    head_dim = cos.shape[1]
    q_and_k, v = qkv.tensor_split([2 * num_heads * head_dim], dim=1)
    heads = v.unflatten(1, (num_heads, -1))
    v = F.pad(heads[..., :head_dim], (0, heads.shape[2] - head_dim), value=1.0).flatten(1)
    return torch.cat((_rotate(q_and_k.unflatten(1, (2 * num_heads, -1)), cos, sin, interleaved).flatten(1), v), dim=1)


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    """Rotate Q and K of packed Q, K and V `[S, N]` in place (`qwenvit.ops.rotate_qk_`)."""
    return qkv.copy_(rotate_qk(qkv, cos, sin, num_heads, interleaved))


def qkv_rope(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    interleaved: bool,
) -> Tensor:
    """Project, then rotate Q and K: `[S, C]` -> `[S, N]` (`qwenvit.ops.qkv_rope`)."""
    return rotate_qk(F.linear(hidden_states, weight, bias), cos, sin, num_heads, interleaved)


def activation(x: Tensor, act: str) -> Tensor:
    """Apply an activation to each element of `x` (any shape)."""
    if act == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def activation_(x: Tensor, act: str) -> Tensor:
    """Apply an activation to each element of `x` in place (`qwenvit.ops.activation_`)."""
    return x.copy_(activation(x, act))


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Project, then apply an activation: `[S, C]` -> `[S, N]` (`qwenvit.ops.linear_act`)."""
    return activation(F.linear(x, weight, bias), act)


def swiglu_pass(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up of alternating columns: `[S, 2·I]` -> `[S, I]` (`qwenvit.ops.swiglu_pass`)."""
    gate, up = gate_up.unflatten(1, (-1, 2)).unbind(2)
    return F.silu(gate) * up


def swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Project to gate and up, then return silu(gate) · up: `[S, C]` -> `[S, I]` (`qwenvit.ops.swiglu`)."""
    return swiglu_pass(F.linear(x, weight, bias))


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """Normalise the last dimension: `[..., C]` -> `[..., C]` (`qwenvit.ops.norm`)."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the norm of `x + residual`, and `x + residual + shift`: both `[..., C]` (`qwenvit.ops.add_norm`)."""
    total = x + residual
    return norm(total, weight, bias, kind, eps), total if shift is None else total + shift


def merge_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    restore_index: Tensor | None,
    kind: str,
    eps: float,
    norm_merged: bool,
    merge_unit: int,
) -> Tensor:
    """Normalise and merge: `[patches, C]` -> `[tokens, merge_unit · C]`, reordered (`qwenvit.ops.merge_norm`)."""
    joined = (-1, merge_unit * x.shape[-1])
    y = norm(x.view(joined), weight, bias, kind, eps) if norm_merged else norm(x, weight, bias, kind, eps).view(joined)
    return y if restore_index is None else y[restore_index]


def spatial_merge(x: Tensor, mode: str, merge_size: int) -> Tensor:
    """Merge blocks: `[..., H, W, C]` -> `[..., H / merge_size, W / merge_size, C']` (`qwenvit.ops.spatial_merge`)."""
    blocks = x.unflatten(-2, (-1, merge_size)).unflatten(-4, (-1, merge_size)).transpose(-4, -3)
    return blocks.flatten(-3) if mode == "concat" else blocks.mean((-3, -2))


def clone_rows(tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Copy the first rows of matrices, each `[at least rows, C]` -> `[rows, C]` (`qwenvit.ops.clone_rows`)."""
    return [x[:rows].clone() for x in tensors]


def interpolate_positions(table: Tensor, taps: Tensor, tap_weights: Tensor) -> Tensor:
    """Sum weighted rows `[entries, C]`: taps `[patches, 4]` -> `[patches, C]` (`qwenvit.ops.interpolate_positions`)."""
    return (table[taps] * tap_weights[:, :, None]).sum(1).to(table.dtype)


def _to_window_order(x: Tensor, restore_index: Tensor | None, merge_unit: int) -> Tensor:
    """Move token i of `x`, `[patches, C]`, to `restore_index[i]`; a token is `merge_unit` rows."""
    if restore_index is None:
        return x
    tokens = x.unflatten(0, (-1, merge_unit))
    return torch.empty_like(tokens).index_copy(0, restore_index, tokens).flatten(0, 1)


def add_positions(
    x: Tensor, table: Tensor, taps: Tensor, tap_weights: Tensor, restore_index: Tensor | None, merge_unit: int
) -> Tensor:
    """Add learned positions and reorder: `[patches, C]` -> `[patches, C]` (`qwenvit.ops.add_positions`)."""
    return _to_window_order(x + interpolate_positions(table, taps, tap_weights), restore_index, merge_unit)


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    taps: Tensor | None,
    tap_weights: Tensor | None,
    restore_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    """Project, add positions and reorder: `[patches, K]` -> `[patches, C]` (`qwenvit.ops.patch_embed`)."""
    x = F.linear(pixel_values.to(weight.dtype), weight, bias)
    if table is not None and taps is not None and tap_weights is not None:
        return add_positions(x, table, taps, tap_weights, restore_index, merge_unit)
    return _to_window_order(x, restore_index, merge_unit)


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    interleaved: bool,
) -> Tensor:
    """Rotate Q and K, `[S, H, D]`, in fp32 and round them; then attend segment by segment: `[S, H, D]`.

    The operation is `qwenvit.ops.rope_attention`; `cos` and `sin` are `[S, D / 2]` or `[S, D]`. Channels of V beyond D
    are not read.

    Raises:
        ValueError: `cu_seqlens` decreases, or does not start at 0 and end at S.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != len(q) or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to {len(q)}, got {bounds}")
    if cos is not None and sin is not None:
        if cos.shape[1] < q.shape[2]:
            cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
        q, k = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    v = v[..., : q.shape[2]]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start, end in pairwise(bounds):
        if end > start:
            # contiguous(): torch's attention on a GPU cannot read fp32 rows that are not aligned to 16 bytes.
            own_q, own_k, own_v = (x[None, start:end].transpose(1, 2).contiguous() for x in (q, k, v))
            out[start:end] = F.scaled_dot_product_attention(own_q, own_k, own_v, scale=scale)[0].transpose(0, 1)
    return out


def grid_plan(
    table: Tensor, config: VisionConfig, patches: int, frames: int, windows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Build the `GridPlan` of a table `[items + 1, 5]` and pad it to capacity (`qwenvit.ops.grid_plan`)."""
    rows = table.cpu()
    sizes = rows[1:, 0] - rows[:-1, 0]
    used = sizes > 0
    h_and_w = rows[:-1, 3:][used]
    grid_thw = torch.cat((sizes[used, None] // h_and_w.prod(1, keepdim=True), h_and_w), 1)
    plan = GridPlan.build(grid_thw, config, table.device)
    spare = patches - plan.num_patches

    def pad_segments(cu_seqlens: Tensor, capacity: int) -> Tensor:
        return F.pad(cu_seqlens, (0, capacity + 1 - len(cu_seqlens)), value=plan.num_patches)

    restore = taps = weights = window_bounds = None
    if plan.windows is not None and plan.restore_index is not None:
        window_bounds = pad_segments(plan.windows.cu_seqlens, windows)
        spare_tokens = torch.arange(len(plan.restore_index), patches // config.merge_unit, device=table.device)
        restore = torch.cat((plan.restore_index, spare_tokens))
    cos, sin = F.pad(plan.cos, (0, 0, 0, spare), value=1.0), F.pad(plan.sin, (0, 0, 0, spare))
    if plan.position_taps is not None and plan.position_weights is not None:
        taps, weights = (F.pad(x, (0, 0, 0, spare)) for x in (plan.position_taps, plan.position_weights))
    return cos, sin, pad_segments(plan.frames.cu_seqlens, frames), window_bounds, restore, taps, weights


def cut_patches(frames: Tensor, patch_size: int, temporal_patch_size: int, merge_size: int) -> Tensor:
    """Cut frames `[T, C, H, W]` into `[patches, C, temporal_patch_size · patch_size²]`, in merge-block order.

    einops is a dependency for this permute and its inverse: the pattern shows the order of patches.
    """
    sides = {"tp": temporal_patch_size, "mh": merge_size, "mw": merge_size, "ph": patch_size, "pw": patch_size}
    return rearrange(frames, f"{_FRAMES} -> {_PATCHES}", **sides)


def join_patches(
    patches: Tensor, grid: tuple[int, int, int], patch_size: int, temporal_patch_size: int, merge_size: int
) -> Tensor:
    """Join `[patches, C, temporal_patch_size · patch_size²]` to frames `[T, C, H, W]`: the inverse of `cut_patches`.

    `grid` is the number of groups of frames, and of rows and columns of patches.
    """
    groups, rows, columns = grid
    sides = {"tp": temporal_patch_size, "mh": merge_size, "mw": merge_size, "ph": patch_size, "pw": patch_size}
    counts = {"t": groups, "h": rows // merge_size, "w": columns // merge_size}
    return rearrange(patches, f"{_PATCHES} -> {_FRAMES}", **sides, **counts)


def resize_patches(
    frames: Tensor,
    plan: ResizePlan,
    levels: Tensor,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
) -> Tensor:
    """Resize frames `[F, 3, H, W]` uint8, normalise them and cut them into patches (`qwenvit.ops.resize_patches`)."""
    for one, table in zip(plan.passes, plan.tables(plan.table.to(frames.device)), strict=True):
        first, *weights = table.unbind(1)
        dim = 2 if one.vertical else 3
        total = torch.tensor(1 << (one.precision - 1), dtype=torch.int32, device=frames.device)
        for tap, weight in enumerate(weights):
            pixels = frames.index_select(dim, first + tap).int()
            total = total + pixels * (weight[:, None] if one.vertical else weight)
        frames = (total >> one.precision).clamp(0, 255).to(torch.uint8)
    if missing := -len(frames) % temporal_patch_size:
        frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
    patches = cut_patches(frames, patch_size, temporal_patch_size, merge_size)
    return torch.stack([levels[c][patches[:, c].int()] for c in range(3)], dim=1).flatten(1)
