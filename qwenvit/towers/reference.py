"""The reference tower: plain torch, differentiable, any device. It defines what every other tower must compute.

It follows Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923: windows, RMSNorm, SwiGLU) and Qwen3-VL
(arXiv:2511.21631: learned positions, DeepStack). Operations have the order of transformers' towers with
`attn_implementation="sdpa"`, so the outputs are bitwise equal on a CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwenvit.config.vision_config import NORM_EPS, VisionConfig
from qwenvit.outputs import TowerOutput
from qwenvit.plan.grid_plan import GridPlan, Segments
from qwenvit.plan.rope import apply_rope


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `x`."""
        return x * torch.sigmoid(1.702 * x)


def _activation(name: str) -> nn.Module:
    if name == "quick_gelu":
        return QuickGELU()
    if name == "silu":
        return nn.SiLU()
    return nn.GELU(approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with statistics in fp32 (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `x`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def _norm(config: VisionConfig, width: int) -> nn.Module:
    return RMSNorm(width) if config.traits.norm == "rms" else nn.LayerNorm(width, eps=NORM_EPS)


class PatchEmbed(nn.Module):
    """One linear map per patch, written as the convolution whose kernel is its stride."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_shape = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        kernel = self.patch_shape[1:]
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, kernel, stride=kernel, bias=config.traits.patch_bias
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed patches `[patches, C·T·P·P]` of any floating dtype as `[patches, hidden_size]` in the tower's dtype."""
        patches = pixel_values.to(self.proj.weight.dtype).view(-1, *self.patch_shape)
        return self.proj(patches).flatten(1)


class Attention(nn.Module):
    """Multi-head attention with 2-D RoPE inside segments."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.scale = config.head_dim**-0.5
        if config.traits.separate_qkv:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of `x`, `[patches, heads, head_dim]` each."""
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        return tuple(part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """Return `[patches, hidden_size]`, like `x`; `cos` and `sin` are `[patches, head_dim]` fp32."""
        q, k, v = self.project(x)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return self.proj(segment_attention(q, k, v, segments, self.scale).flatten(1))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """Compute the softmax attention of each patch to the patches of its own segment.

    Segments of equal length share a call, which returns the same numbers as a call for each segment.

    Args:
        q: queries `[patches, heads, head_dim]`, rotated.
        k: keys `[patches, heads, head_dim]`, rotated.
        v: values `[patches, heads, head_dim]`.
        segments: the runs of patches that attend to one another.
        scale: factor on the scores before the softmax.

    Returns:
        `[patches, heads, head_dim]`.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [segments, length, heads, head_dim]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    if len(segments.cu_seqlens) == 2:  # one segment: nothing to gather
        return attend(q[None], k[None], v[None])[0]
    out = torch.empty_like(v)
    for _, patches in segments.groups:
        out[patches] = attend(q[patches], k[patches], v[patches])
    return out


class MLP(nn.Module):
    """Two linear maps with an activation in between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = _activation(config.hidden_act)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[patches, hidden_size]`, like `x`."""
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    """SwiGLU: one linear map gates another (arXiv:2002.05202)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = _activation(config.hidden_act)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[patches, hidden_size]`, like `x`."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = _norm(config, config.hidden_size)
        self.norm2 = _norm(config, config.hidden_size)
        self.attn = Attention(config)
        self.mlp = GatedMLP(config) if config.traits.gated_mlp else MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """Return `[patches, hidden_size]`, like `x`."""
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Merge the patches of each merge block into one token of the language model's width."""

    def __init__(self, config: VisionConfig, norm_merged: bool = False) -> None:
        super().__init__()
        self.merged_width = config.hidden_size * config.merge_unit
        self.norm_merged = norm_merged  # DeepStack's mergers normalize after merging, the final one before
        self.norm = _norm(config, self.merged_width if norm_merged else config.hidden_size)
        self.fc1 = nn.Linear(self.merged_width, self.merged_width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(self.merged_width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Merge patches `[patches, hidden_size]` into tokens `[tokens, out_hidden_size]`, in the patches' order."""
        merged = (-1, self.merged_width)
        x = self.norm(x.view(merged)) if self.norm_merged else self.norm(x).view(merged)
        return self.fc2(self.act(self.fc1(x)))


class ReferenceTower(nn.Module):
    """Vision tower of any family.

    Args:
        config: the tower's config. Parameters have torch's initial values: load a checkpoint.

    Attributes:
        gradient_checkpointing: keep each block's input alone for the backward pass, which then runs the block again.
            Less memory for a third more time; the gradients are the same. Without gradients it changes nothing.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config)
        if config.num_position_embeddings is not None:
            self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)
        self.deepstack_mergers = nn.ModuleList(
            Merger(config, norm_merged=True) for _ in config.deepstack_visual_indexes
        )

    def forward(self, pixel_values: Tensor, plan: GridPlan) -> TowerOutput:
        """Encode packed patches.

        Args:
            pixel_values: `[patches, C·T·P·P]` in any floating dtype, patches in merge-block order.
            plan: the plan of the same patches' grids, on the tower's device.

        Returns:
            Features of all items, packed one after another.
        """
        x = self.embed(pixel_values, plan)
        deepstack_features = []
        for index in range(self.config.depth):
            x = self.apply_block(index, x, plan)
            if index in self.config.deepstack_visual_indexes:
                merger = self.deepstack_mergers[self.config.deepstack_visual_indexes.index(index)]
                deepstack_features.append(merger(x))
        tokens = self.merger(x)
        if plan.restore_index is not None:
            tokens = tokens[plan.restore_index]
        return TowerOutput(x, tokens, deepstack_features)

    def embed(self, pixel_values: Tensor, plan: GridPlan) -> Tensor:
        """Embed patches and add their positions, the first part of `forward`.

        Args:
            pixel_values: `[patches, C·T·P·P]` in any floating dtype, patches in merge-block order.
            plan: the plan of the same patches' grids, on the tower's device.

        Returns:
            The first block's input, `[patches, hidden_size]`, in the tower's order.
        """
        x = self.patch_embed(pixel_values)
        if plan.position_taps is not None and plan.position_weights is not None:
            positions = (self.pos_embed(plan.position_taps) * plan.position_weights[:, :, None]).sum(1)
            x = x + positions.to(x.dtype)
        if plan.window_index is not None:
            x = x.unflatten(0, (-1, self.config.merge_unit))[plan.window_index].flatten(0, 1)
        return x

    def apply_block(self, index: int, x: Tensor, plan: GridPlan) -> Tensor:
        """Run one block, inside frames or windows as the config says.

        Args:
            index: the block, from 0.
            x: the block's input, `[patches, hidden_size]`, in the tower's order.
            plan: the plan of the same patches' grids, on the tower's device.

        Returns:
            The block's output, a new tensor like `x`.
        """
        arguments = (x, plan.cos, plan.sin, self.segments_of(index, plan))
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.blocks[index], *arguments, use_reentrant=False)
        return self.blocks[index](*arguments)

    def segments_of(self, index: int, plan: GridPlan) -> Segments:
        """Return the runs of patches that attend to one another in a block: frames or windows."""
        return plan.frames if plan.windows is None or self.config.is_full_attention(index) else plan.windows
