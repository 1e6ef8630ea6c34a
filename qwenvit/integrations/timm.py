"""The encoder under timm's names for features. timm itself is not needed."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qwenvit.arguments import check_indices, check_integers
from qwenvit.encoder import Encoder
from qwenvit.ops.reference import cut_patches
from qwenvit.towers.reference import ReferenceTower


class TimmModel(nn.Module):
    """A vision tower with the methods and attributes by which code for timm's ViTs reads features.

    Images are normalised floats `[B, 3, H, W]` of one size, as `default_cfg` and `timm.data.create_transform` make
    them; both sides are multiples of `patch_size · spatial_merge_size`. Each passes as a still: it is repeated to fill
    its temporal patch. Patches are in reading order whatever the tower's own order; there is no class token.

    Indices of blocks are timm's: 0 is the *output* of the first block, which `Encoder.features` and transformers'
    `hidden_states` call 1.

    Gradients reach the images and the weights with the reference tower (`impl="reference"`). `Encoder` freezes the
    weights: `model.requires_grad_()` thaws them.

    Attributes:
        tower: the encoder's tower, shared with it.
        num_features: channels of a feature, `hidden_size`. `embed_dim` and `head_hidden_size` are the same.
        feature_info: `module`, `num_chs` and `reduction` of each block, as `timm.models.FeatureInfo` reads them.
        default_cfg: input size, mean and standard deviation, as `timm.data.resolve_data_config` reads them. Any other
            size is accepted. `pretrained_cfg` is the same.

    Args:
        encoder: any encoder; the fast tower gives no gradients.
    """

    num_classes = 0
    num_prefix_tokens = 0
    global_pool = "avg"

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.tower = encoder.tower
        config, processor = encoder.config, encoder.image_processor
        self.num_features = self.head_hidden_size = self.embed_dim = config.hidden_size
        self.feature_info = [
            {"module": f"tower.blocks.{block}", "num_chs": config.hidden_size, "reduction": config.patch_size}
            for block in range(config.depth)
        ]
        side = -(-224 // processor.factor) * processor.factor
        self.default_cfg = self.pretrained_cfg = {
            "architecture": config.family,
            "num_classes": 0,
            "input_size": (3, side, side),
            "min_input_size": (3, processor.factor, processor.factor),
            "fixed_input_size": False,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": processor.image_mean,
            "std": processor.image_std,
            "first_conv": "tower.patch_embed.proj",
            "classifier": None,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return one vector for each image, `[B, hidden_size]`: `forward_head(forward_features(x))`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last block's patches after the final norm, that of the merger: `[B, patches, hidden_size]`."""
        (maps,) = self._maps(x, [self.encoder.config.depth], norm=True)
        return maps.flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # noqa: ARG002 (there is no classifier)
        """Average the patches of each image: `[B, patches, hidden_size]` to `[B, hidden_size]`, summed in fp32."""
        # One image at a time: torch orders the sums of a batch by its size.
        return torch.stack([patches.mean(0, dtype=torch.float32) for patches in x]).to(x.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return features of chosen blocks.

        Args:
            x: images `[B, 3, H, W]`.
            indices: blocks by timm's index, negative from the end; an int n for the last n blocks, None for all.
            norm: apply the final norm to the intermediates too.
            stop_early: end at the deepest chosen block; the final features are then of that block.
            output_fmt: of the intermediates: `"NCHW"`, `[B, hidden_size, rows, columns]`, or `"NLC"`,
                `[B, patches, hidden_size]`.
            intermediates_only: leave out the final features.

        Returns:
            The intermediates, in the order of the blocks and each once, whatever the order of `indices`; before them,
            unless left out, the final features as `forward_features` returns them.

        Raises:
            TypeError: `x` is not a floating tensor, or `indices` are no integers.
            ValueError: images of another shape, an index of no block, an unknown format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        depth = self.encoder.config.depth
        blocks = _take_blocks(indices, depth)
        last = max(blocks) if stop_early else depth - 1
        layers = sorted({*blocks} if intermediates_only else {*blocks, last})
        maps = dict(zip(layers, self._maps(x, [layer + 1 for layer in layers], norm), strict=True))
        chosen = [maps[block] for block in blocks]
        if output_fmt == "NCHW":
            intermediates = [one.permute(0, 3, 1, 2).contiguous() for one in chosen]
        else:
            intermediates = [one.flatten(1, 2) for one in chosen]
        if intermediates_only:
            return intermediates
        final = maps[last].flatten(1, 2)
        if not norm:
            final = self.tower.merger.norm(final.flatten(0, 1)).view_as(final)
        return final, intermediates

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep each block's input alone for the backward pass, which then runs the block again.

        Raises:
            ValueError: the fast tower, which has no backward pass.
        """
        if not isinstance(self.tower, ReferenceTower):
            raise ValueError("enable: the fast tower gives no gradients; load the encoder with impl='reference'")
        self.tower.gradient_checkpointing = enable

    def _maps(self, x: Tensor, layers: list[int], norm: bool) -> list[Tensor]:
        """Return `[B, rows, columns, hidden_size]` for each layer, counted as `Encoder.features` counts."""
        config = self.encoder.config
        grid = [1, *_grid_of(x, config.patch_size, config.spatial_merge_size)]
        frames = x.repeat_interleave(config.temporal_patch_size, dim=0)
        patches = cut_patches(frames, config.patch_size, config.temporal_patch_size, config.spatial_merge_size)
        grids = torch.tensor([grid] * len(x), device="cpu")
        items = self.encoder.features_of_pixels(patches.flatten(1), grids, layers, norm=norm)
        return [torch.stack(maps) for maps in zip(*(item.maps for item in items), strict=True)]


def _take_blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Return the blocks that `indices` names, ascending, each once."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, Iterable):
        return sorted({*check_indices("indices", indices, depth)})
    (count,) = check_integers("indices", [indices], "an integer, a sequence of integers or None")
    if not 0 < count <= depth:
        raise ValueError(f"indices: expected the last 1 to {depth} blocks, got {count}")
    return list(range(depth - count, depth))


def _grid_of(x: Tensor, patch_size: int, merge_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of images `[B, 3, H, W]`."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected normalised floats [B, 3, H, W], got {got}")
    side = patch_size * merge_size
    if x.ndim != 4 or x.shape[1] != 3 or not x.numel() or x.shape[2] % side or x.shape[3] % side:
        raise ValueError(f"x: expected [B, 3, H, W] with H and W multiples of {side}, got {list(x.shape)}")
    return x.shape[2] // patch_size, x.shape[3] // patch_size
