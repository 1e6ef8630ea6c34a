"""The fast tower: inference on a GPU, built of the operations in `qwenvit.ops`, held to the reference tower.

Weights are packed once, when they are loaded: rotary pairs adjacent, gate and up in one product, rows padded to whole
tiles. `load_state_dict` takes and `state_dict` gives the reference tower's names and shapes, so the two are exchanged
freely. A block is two norms, four matrix products and an attention: nothing is reordered, and nothing but queries and
keys of long segments is written twice.
"""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwenvit import ops
from qwenvit.arguments import DTYPES, Impl
from qwenvit.config.vision_config import VisionConfig
from qwenvit.ops.packing import LANES, pack_gate_up, pad_columns
from qwenvit.outputs import TowerOutput
from qwenvit.plan.grid_plan import DevicePlan, GridPlan, Segments
from qwenvit.towers.attention import VisionAttention
from qwenvit.towers.packed import Packed

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "gelu": "gelu"}


class Norm(nn.Module):
    """Weights of an RMSNorm or a LayerNorm."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        self.kind = config.traits.norm
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if self.kind == "layer" else None


class PatchEmbed(Packed):
    """Patch embedding; each row of the weight starts a 128-byte line.

    Of a still image one frame is made and moved: `encode` at 1344² with a tower of one block takes 8.7 ms, and 13.1 of
    two frames (Qwen2.5-VL; Qwen3-VL 9.3 and 13.7; one H200). On the GPU that frame is repeated, in 23 µs. A weight of
    which the frames are summed would save these and 16 to 18 µs of the product, but rounding it to bf16 is a mistake
    that transformers does not make: the embedding's error becomes 1.26 to 1.29 times transformers' (1.03 to 1.08 where
    learned positions are added), that of a narrow tower grows by up to 7 % after 4 blocks and 3 % at full depth, of 5 %
    allowed (CPU, weights that are bf16 themselves; on the GPU, Qwen2.5-VL's after 4 blocks is 0.90 of transformers'
    where two frames have 0.86). A second weight for what rounding loses gives the error of two frames again, and a
    product as long as theirs.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.kernel = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_dim = config.patch_dim
        self.weight = nn.Parameter(torch.empty(config.hidden_size, -(-self.patch_dim // LANES) * LANES))
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.traits.patch_bias else None

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`proj.weight` `[C, channels, T, P, P]` -> `weight` `[C, padded]`."""
        packed = {name.removeprefix("proj."): tensor for name, tensor in tensors.items()}
        if packed["weight"].shape[1:] != self.kernel:
            raise ValueError(f"proj.weight: expected kernels {self.kernel}, got {tuple(packed['weight'].shape[1:])}")
        return packed | {"weight": pad_columns(packed["weight"].flatten(1))}

    def frames(self, pixel_values: Tensor) -> Tensor:
        """Patches by channel and frame, a view: `[patches, C·T·P·P]` or one frame for all -> `[patches, C, T, P·P]`.

        Raises:
            ValueError: any other shape.
        """
        channels, frames, *_ = self.kernel
        pair, still = self.patch_dim, self.patch_dim // frames
        if pixel_values.ndim != 2 or pixel_values.shape[1] not in (pair, still):
            expected = f"[patches, {pair}], or [patches, {still}] of still images"
            raise ValueError(f"pixel_values: expected {expected}, got {list(pixel_values.shape)}")
        given = 1 if pixel_values.shape[1] == still else frames
        return pixel_values.unflatten(1, (channels, given, -1)).expand(-1, -1, frames, -1)

    def unpack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `pack`."""
        weight = tensors["weight"][:, : self.patch_dim].contiguous().unflatten(1, self.kernel)
        return {f"proj.{name}": tensor for name, tensor in (tensors | {"weight": weight}).items()}


class MLP(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    @property
    def last_bias(self) -> Tensor:
        """What `accumulate` leaves for others to add."""
        return self.fc2.bias

    def accumulate(self, x: Tensor, y: Tensor, impl: Impl) -> Tensor:
        """`x` plus the MLP of `y` without its last bias, `[patches, hidden_size]`, in place."""
        hidden = ops.linear_act(y, self.fc1.weight, self.fc1.bias, self.act, impl)
        return x.addmm_(hidden, self.fc2.weight.T)


class GatedMLP(Packed):
    """SwiGLU; gate and up alternate in one weight, widths are padded (`qwenvit.packing`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.intermediate_size = config.intermediate_size
        padded = -(-config.intermediate_size // LANES) * LANES
        self.gate_up = nn.Linear(config.hidden_size, 2 * padded)
        self.down = nn.Linear(padded, config.hidden_size)

    def pack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`gate_proj`, `up_proj`, `down_proj` -> `gate_up`, `down`."""
        gate, up = ((tensors[f"{part}_proj.weight"], tensors[f"{part}_proj.bias"]) for part in ("gate", "up"))
        if len(gate[0]) != self.intermediate_size:
            raise ValueError(f"gate_proj.weight: expected {self.intermediate_size} rows, got {len(gate[0])}")
        packed = dict(zip(("gate_up.weight", "gate_up.bias"), pack_gate_up(*gate, *up), strict=True))
        down = {"down.weight": pad_columns(tensors["down_proj.weight"]), "down.bias": tensors["down_proj.bias"]}
        return {name: tensor for name, tensor in (packed | down).items() if tensor is not None}

    def unpack(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `pack`."""
        width, unpacked = self.intermediate_size, {}
        for i, part in enumerate(("gate", "up")):
            for kind in ("weight", "bias"):
                rows = tensors[f"gate_up.{kind}"].unflatten(0, (-1, 2))[:width, i]
                unpacked[f"{part}_proj.{kind}"] = rows.contiguous()
        down = tensors["down.weight"][:, :width].contiguous()
        return unpacked | {"down_proj.weight": down, "down_proj.bias": tensors["down.bias"]}

    @property
    def last_bias(self) -> Tensor:
        """See `MLP.last_bias`."""
        return self.down.bias

    def accumulate(self, x: Tensor, y: Tensor, impl: Impl) -> Tensor:
        """See `MLP.accumulate`."""
        hidden = ops.swiglu(y, self.gate_up.weight, self.gate_up.bias, impl)
        return x.addmm_(hidden, self.down.weight.T)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        self.norm1 = Norm(config, config.hidden_size)
        self.norm2 = Norm(config, config.hidden_size)
        self.attn = VisionAttention(config.hidden_size, config.num_heads, config.traits.separate_qkv, impl)
        self.mlp = GatedMLP(config) if config.traits.gated_mlp else MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        """`[patches, hidden_size]` -> same, in the memory of `x`."""
        norm1, norm2 = self.norm1, self.norm2
        y = ops.norm(x, norm1.weight, norm1.bias, norm1.kind, impl=self.impl)
        y = self.attn.project(y, cos, sin, segments.max_seqlen)
        y = self.attn.attend(y, cos, sin, segments.cu_seqlens, segments.max_seqlen)
        y = self.attn.proj(y)
        y = ops.add_norm_(y, x, norm2.weight, norm2.bias, norm2.kind, shift=self.mlp.last_bias, impl=self.impl)
        return self.mlp.accumulate(x, y, self.impl)


class Merger(nn.Module):
    """Joins the patches of each merge block into one token of the language model's width."""

    def __init__(self, config: VisionConfig, impl: Impl, norm_merged: bool = False) -> None:
        super().__init__()
        self.impl, self.norm_merged, self.merge_unit = impl, norm_merged, config.merge_unit
        merged_width = config.hidden_size * config.merge_unit
        self.norm = Norm(config, merged_width if norm_merged else config.hidden_size)
        self.fc1 = nn.Linear(merged_width, merged_width)
        self.fc2 = nn.Linear(merged_width, config.out_hidden_size)

    def forward(self, x: Tensor, restore_index: Tensor | None) -> Tensor:
        """`[patches, hidden_size]` -> `[tokens, out_hidden_size]`, in reading order."""
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
        return F.linear(y, self.fc2.weight, self.fc2.bias)


def refuse_gradients(tensors: Iterable[Tensor]) -> None:
    """ValueError where gradients are asked of a tower that gives none."""
    if torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), tensors)):
        raise ValueError(
            "pixel_values, parameters: expected none that requires gradients, which the fast tower does not give; "
            "use impl='reference', or torch.no_grad()"
        )


class FastTower(nn.Module):
    """Vision tower of any family, for inference.

    Blocks work in place, each in the memory of its input: hooks have to copy what they keep. (An encoder runs the tower
    in CUDA graphs, and refuses hooks.)

    Args:
        config: the tower's config. Parameters are not initialised: load a checkpoint, or a reference tower's.
        impl: implementation of the operations, see `qwenvit.ops`.

    Raises:
        ValueError: a head width the kernels are not made for.
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
        self.graphs: Any = None  # `qwenvit.graphs` keeps a `GraphedTower` here
        self.requires_grad_(False)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert, as any module; graphs that hold on to memory that is to be freed go, others stay."""
        if self.graphs is not None:
            self.graphs.release_memory()
        try:
            super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        except BaseException:
            self.graphs = None  # some weights may have moved, and nobody holds the memory of any
            raise
        if self.graphs is not None and not self.graphs.retain_memory():
            self.graphs = None
        return self

    def forward(self, pixel_values: Tensor, plan: GridPlan | DevicePlan) -> TowerOutput:
        """Encode packed patches: as the reference tower does, without gradients.

        Args:
            pixel_values: `[patches, C·T·P·P]`, or `[patches, C·P·P]` of still images alone, which stands for T frames
                that are alike.
            plan: of the grids, on the tower's device.

        Raises:
            ValueError: `pixel_values` of another width; gradients are asked for.
        """
        refuse_gradients(chain([pixel_values], self.parameters()))
        return self.transform(self.embed(pixel_values, plan), plan)

    def embed(self, pixel_values: Tensor, plan: GridPlan | DevicePlan) -> Tensor:
        """The first half of `forward`: what the first block gets, `[patches, hidden_size]`, in the tower's order."""
        embed = self.patch_embed
        weight = embed.weight[:, : embed.patch_dim]
        if pixel_values.dtype not in DTYPES.values():
            pixel_values = pixel_values.to(weight.dtype)
        table = None if plan.position_taps is None else self.pos_embed.weight
        positions = (table, plan.position_taps, plan.position_weights)
        order = (plan.restore_index, self.config.merge_unit)
        pixel_values = embed.frames(pixel_values).flatten(1).contiguous()
        return ops.patch_embed(pixel_values, weight, embed.bias, *positions, *order, impl=self.impl)

    def transform(self, x: Tensor, plan: GridPlan | DevicePlan) -> TowerOutput:
        """The second half of `forward`, which needs no pixel values, in the memory of `x`."""
        deepstack_features = []
        for index, block in enumerate(self.blocks):
            full = plan.windows is None or self.config.is_full_attention(index)
            x = block(x, plan.cos, plan.sin, plan.frames if full else plan.windows)
            if index in self.config.deepstack_visual_indexes:
                merger = self.deepstack_mergers[self.config.deepstack_visual_indexes.index(index)]
                deepstack_features.append(merger(x, None))
        return TowerOutput(x, self.merger(x, plan.restore_index), deepstack_features)
