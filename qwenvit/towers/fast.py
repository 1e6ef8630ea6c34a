"""The fast tower: inference on a GPU, built of the operations in `qwenvit.ops`, tested against the reference tower.

Weights are packed once, when they are loaded: rotary pairs become adjacent, values of head_dim 72 get room for ones,
gate and up projection become one product, and rows are padded to whole tiles. `load_state_dict` takes and `state_dict`
returns the reference tower's names and shapes. A block is two norms, four matrix products and an attention. No block
reorders tokens, and only the queries and keys of long segments are written twice.
"""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any, Self

import torch
from torch import Tensor, nn

from qwenvit import ops
from qwenvit.arguments import Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.checks import FLOATING
from qwenvit.ops.packing import WIDTH_MULTIPLE, pack_gate_up, pad_columns
from qwenvit.outputs import TowerOutput
from qwenvit.plan.grid_plan import DevicePlan, GridPlan
from qwenvit.towers.attention import VisionAttention
from qwenvit.towers.packed import Packed

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "gelu": "gelu"}


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension. Fused operations take its weights instead of calling it."""

    def __init__(self, config: VisionConfig, width: int, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        self.kind = config.traits.norm
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if self.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` `[rows, width]` into a new tensor."""
        return ops.norm(x, self.weight, self.bias, self.kind, impl=self.impl)


class PatchEmbed(Packed):
    """Weights of the patch embedding; each row starts a 128-byte line.

    Stills repeat their frame. Summing the weights over frames instead was rejected: 1.29× error (TUNING.md).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.kernel_shape = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_dim = config.patch_dim
        padded = -(-self.patch_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.weight = nn.Parameter(torch.empty(config.hidden_size, padded))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.traits.patch_bias else None

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn `proj.weight` `[hidden_size, C, T, P, P]` into `weight` `[hidden_size, padded C·T·P·P]`."""
        packed = {name.removeprefix("proj."): tensor for name, tensor in tensors.items()}
        if packed["weight"].shape[1:] != self.kernel_shape:
            raise ValueError(
                f"proj.weight: expected kernels {self.kernel_shape}, got {tuple(packed['weight'].shape[1:])}"
            )
        return packed | {"weight": pad_columns(packed["weight"].flatten(1))}

    def unpack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo `pack`."""
        weight = tensors["weight"][:, : self.patch_dim].contiguous().unflatten(1, self.kernel_shape)
        return {f"proj.{name}": tensor for name, tensor in (tensors | {"weight": weight}).items()}


class MLP(nn.Module):
    """Two linear maps with an activation in between."""

    def __init__(self, config: VisionConfig, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    @property
    def last_bias(self) -> Tensor:
        """`[hidden_size]`: the bias of the second map, which `forward` leaves out."""
        return self.fc2.bias

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        """Add the MLP of `y`, without its last bias, to `residual` in place; both `[patches, hidden_size]`."""
        hidden = ops.linear_act(y, self.fc1.weight, self.fc1.bias, self.act, self.impl)
        return ops.add_linear_(residual, hidden, self.fc2.weight, self.impl)


class GatedMLP(Packed):
    """SwiGLU. Rows of gate and up projection alternate in one weight, and widths are padded (`qwenvit.packing`)."""

    def __init__(self, config: VisionConfig, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        self.intermediate_size = config.intermediate_size
        padded = -(-config.intermediate_size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.gate_up = nn.Linear(config.hidden_size, 2 * padded)
        self.down = nn.Linear(padded, config.hidden_size)

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn `gate_proj`, `up_proj` and `down_proj` into `gate_up` and `down`."""
        gate, up = ((tensors[f"{part}_proj.weight"], tensors[f"{part}_proj.bias"]) for part in ("gate", "up"))
        if len(gate[0]) != self.intermediate_size:
            raise ValueError(f"gate_proj.weight: expected {self.intermediate_size} rows, got {len(gate[0])}")
        if (columns := tensors["down_proj.weight"].shape[1]) != self.intermediate_size:
            raise ValueError(f"down_proj.weight: expected {self.intermediate_size} columns, got {columns}")
        packed = dict(zip(("gate_up.weight", "gate_up.bias"), pack_gate_up(*gate, *up), strict=True))
        down = {"down.weight": pad_columns(tensors["down_proj.weight"]), "down.bias": tensors["down_proj.bias"]}
        return {name: tensor for name, tensor in (packed | down).items() if tensor is not None}

    def unpack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo `pack`."""
        width, unpacked = self.intermediate_size, {}
        for i, part in enumerate(("gate", "up")):
            for kind in ("weight", "bias"):
                rows = tensors[f"gate_up.{kind}"].unflatten(0, (-1, 2))[:width, i]
                unpacked[f"{part}_proj.{kind}"] = rows.contiguous()
        down = tensors["down.weight"][:, :width].contiguous()
        return unpacked | {"down_proj.weight": down, "down_proj.bias": tensors["down.bias"]}

    @property
    def last_bias(self) -> Tensor:
        """`[hidden_size]`: the bias of the down projection, which `forward` leaves out."""
        return self.down.bias

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        """Add the MLP of `y`, without its last bias, to `residual` in place; both `[patches, hidden_size]`."""
        hidden = ops.swiglu(y, self.gate_up.weight, self.gate_up.bias, self.impl)
        return ops.add_linear_(residual, hidden, self.down.weight, self.impl)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        self.norm1 = Norm(config, config.hidden_size, impl)
        self.norm2 = Norm(config, config.hidden_size, impl)
        self.attn = VisionAttention(config.hidden_size, config.num_heads, config.traits.separate_qkv, impl)
        self.mlp = GatedMLP(config, impl) if config.traits.gated_mlp else MLP(config, impl)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
        """Transform `x` in place.

        Args:
            x: `[patches, hidden_size]`.
            cos: `[patches, head_dim]` fp32.
            sin: `[patches, head_dim]` fp32.
            cu_seqlens: `[segments + 1]` int32.
            max_seqlen: patches of a whole window; None for frames, so that the longest frame of a batch does not choose
                the kernel.
        """
        norm2 = self.norm2
        y = self.norm1(x)
        y = self.attn.project(y, cos, sin, max_seqlen)
        y = self.attn.attend(y, cos, sin, cu_seqlens, max_seqlen)
        y = self.attn.project_output(y)
        y = ops.add_norm_(y, x, norm2.weight, norm2.bias, norm2.kind, shift=self.mlp.last_bias, impl=self.impl)
        return self.mlp(y, residual=x)


class Merger(nn.Module):
    """Merge the patches of each merge block into one token of the language model's width."""

    def __init__(self, config: VisionConfig, impl: Impl, norm_merged: bool = False) -> None:
        super().__init__()
        self.impl, self.norm_merged, self.merge_unit = impl, norm_merged, config.merge_unit
        merged_width = config.hidden_size * config.merge_unit
        self.norm = Norm(config, merged_width if norm_merged else config.hidden_size, impl)
        self.fc1 = nn.Linear(merged_width, merged_width)
        self.fc2 = nn.Linear(merged_width, config.out_hidden_size)

    def forward(self, x: Tensor, restore_index: Tensor | None) -> Tensor:
        """Merge patches `[patches, hidden_size]` into tokens `[tokens, out_hidden_size]` in reading order.

        Args:
            x: hidden states in the tower's order.
            restore_index: `GridPlan.restore_index`; None keeps the order of `x`.
        """
        y = ops.merge_norm(
            x,
            self.norm.weight,
            self.norm.bias,
            restore_index,
            self.norm.kind,
            norm_merged=self.norm_merged,
            merge_unit=self.merge_unit,
            impl=self.impl,
        )
        y = ops.linear_act(y, self.fc1.weight, self.fc1.bias, "gelu", self.impl)
        return ops.linear(y, self.fc2.weight, self.fc2.bias, self.impl)


def refuse_gradients(tensors: Iterable[Tensor]) -> None:
    """Raise ValueError if gradients are enabled and a tensor requires them: the fast tower computes none."""
    if torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), tensors)):
        raise ValueError(
            "pixel_values, parameters: expected none that requires gradients, which the fast tower does not give; "
            "use impl='reference', or torch.no_grad()"
        )


class FastTower(nn.Module):
    """Vision tower of any family, for inference.

    In 16 bits an item's outputs depend on the item alone, to the last bit (tested on an H200): no kernel is chosen, and
    no sum ordered, by the number of rows. In fp32 cuBLAS orders sums by it.

    Blocks work in place, in the memory of their input: a hook must copy what it keeps. `Encoder` runs the tower in CUDA
    graphs, and refuses hooks.

    Args:
        config: the tower's config. Parameters are not initialised: load a checkpoint or a reference tower's weights.
        impl: implementation of the operations, see `qwenvit.ops`.

    Raises:
        ValueError: the kernels do not support the head width.
    """

    def __init__(self, config: VisionConfig, impl: Impl = "triton") -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        self.patch_embed = PatchEmbed(config)
        if config.num_position_embeddings is not None:
            self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, impl) for _ in range(config.depth))
        self.merger = Merger(config, impl)
        self.deepstack_mergers = nn.ModuleList(
            Merger(config, impl, norm_merged=True) for _ in config.deepstack_visual_indexes
        )
        self.graphs: Any = None  # a `qwenvit.graphs.graphed_tower.GraphedTower`, which `graphs_of` sets
        self.requires_grad_(False)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert as any module does. Graphs are dropped if that moves weights, and kept otherwise."""
        if self.graphs is not None:
            self.graphs.release_memory()
        try:
            super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        except BaseException:
            self.graphs = None  # some weights may have moved, and their old memory is no longer kept allocated
            raise
        if self.graphs is not None and not self.graphs.retain_memory():
            self.graphs = None
        return self

    def forward(self, pixel_values: Tensor, plan: GridPlan | DevicePlan) -> TowerOutput:
        """Encode packed patches as the reference tower does, without gradients.

        Args:
            pixel_values: `[patches, C·T·P·P]`.
            plan: the plan of the same patches' grids, on the tower's device.

        Raises:
            ValueError: `pixel_values` of another width; gradients are requested.
        """
        refuse_gradients(chain([pixel_values], self.parameters()))
        return self.transform(self.embed(pixel_values, plan), plan)

    def embed(self, pixel_values: Tensor, plan: GridPlan | DevicePlan) -> Tensor:
        """Run the patch embedding, the first part of `forward`.

        Returns:
            The first block's input, `[patches, hidden_size]`, in the tower's order.
        """
        embed = self.patch_embed
        weight = embed.weight[:, : embed.patch_dim]
        if pixel_values.dtype not in FLOATING:
            pixel_values = pixel_values.to(weight.dtype)
        table = None if plan.position_taps is None else self.pos_embed.weight
        positions = (table, plan.position_taps, plan.position_weights)
        order = (plan.restore_index, self.config.merge_unit)
        return ops.patch_embed(pixel_values.contiguous(), weight, embed.bias, *positions, *order, impl=self.impl)

    def transform(self, x: Tensor, plan: GridPlan | DevicePlan) -> TowerOutput:
        """Run the blocks and mergers, the rest of `forward`.

        Args:
            x: `[patches, hidden_size]`, from `embed`. The blocks overwrite it, and it becomes `last_hidden_state`.
            plan: the plan of the same patches' grids, on the tower's device.
        """
        deepstack_features = []
        for index in range(self.config.depth):
            x = self.apply_block(index, x, plan)
            if index in self.config.deepstack_visual_indexes:
                merger = self.deepstack_mergers[self.config.deepstack_visual_indexes.index(index)]
                deepstack_features.append(merger(x, None))
        return TowerOutput(x, self.merger(x, plan.restore_index), deepstack_features)

    def apply_block(self, index: int, x: Tensor, plan: GridPlan | DevicePlan) -> Tensor:
        """Run one block in place, inside frames or windows as the config says.

        Args:
            index: the block, from 0.
            x: the block's input, `[patches, hidden_size]`, in the tower's order. The block overwrites it.
            plan: the plan of the same patches' grids, on the tower's device.

        Returns:
            The block's output, in the memory of `x`.
        """
        block = self.blocks[index]
        if plan.windows is None or self.config.is_full_attention(index):
            return block(x, plan.cos, plan.sin, plan.frames.cu_seqlens, None)
        return block(x, plan.cos, plan.sin, plan.windows.cu_seqlens, self.config.window_patches)
