"""Attention maps: how much a patch attends to every other patch of its image, in chosen blocks and heads."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack, cast

import torch
from torch import Tensor

from qwenvit.arguments import check_indices, check_integers
from qwenvit.plan.grid_plan import GridPlan, Segments
from qwenvit.plan.reading_order import reading_order
from qwenvit.plan.rope import apply_rope
from qwenvit.preprocess.decode import ImageInput
from qwenvit.preprocess.options import ImageOptions
from qwenvit.towers.hidden_states import iter_hidden_states
from qwenvit.towers.reference import Block, ReferenceTower

if TYPE_CHECKING:
    from qwenvit.encoder import Encoder

WARN_BYTES = 2**30
"""`attention_maps` warns before it computes maps that take more memory than this: 1 GiB."""
PIECE_BYTES = 2**27
"""Probabilities are computed in pieces of at most this size (128 MiB), or of one query; scores take as much."""

Patch = tuple[int, int]
"""Row and column of a patch in its image's grid, from the upper left."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention probabilities of one image, in the places of its patches."""

    maps: tuple[Tensor, ...]
    """`[heads, queries, rows, columns]` float32 for each block: how much the query attends to each patch. Each map
    sums to 1, and is 0 outside the query's window."""
    blocks: tuple[int, ...]
    """The blocks, from 0."""
    heads: tuple[int, ...]
    """The heads of every map, from 0."""
    queries: tuple[Patch, ...]
    """The patch that attends, for each map of a head."""
    grid: tuple[int, int]
    """Rows and columns of patches."""

    def cpu(self) -> "AttentionMaps":
        """Return a copy on the CPU."""
        return replace(self, maps=tuple(one.cpu() for one in self.maps))


@torch.no_grad()
def attention_maps(
    encoder: "Encoder",
    image: ImageInput,
    blocks: Iterable[int] = (-1,),
    heads: Iterable[int] | None = None,
    queries: Sequence[Patch] | None = None,
    **options: Unpack[ImageOptions],
) -> AttentionMaps:
    """Compute where patches of an image look: the attention probabilities of chosen blocks and heads.

    The tower is the reference tower (`Encoder.from_pretrained(..., impl="reference")`), on any device and in any dtype.
    It stops before the deepest block asked. The probabilities are the softmax in float32 of the block's own queries and
    keys; no more than `PIECE_BYTES` of them are computed at a time. The result takes
    `blocks · heads · queries · patches · 4` bytes: for every query of an image of 896² pixels, with 4,096 patches of 14
    pixels and 16 heads, 1 GiB a block.

    Args:
        encoder: an encoder with the reference tower.
        image: a PIL image, a uint8 array or tensor, a path, or encoded bytes.
        blocks: which blocks, as in transformers' `attentions`: 0 is the first, -1 the last.
        heads: which heads, from 0; negative as in Python. None: all.
        queries: row and column of the patches that attend, in the grid of the resized image: the pixel `(y, x)` of an
            image of `height` × `width` pixels is in row `y · rows // height` and column `x · columns // width`. None:
            all patches, in reading order.
        options: min_pixels, max_pixels, max_tokens, size, resize, do_rescale, channels; see `ImageOptions`.

    Returns:
        The maps, on the tower's device.

    Raises:
        TypeError: an unknown option, an image of a type or dtype that is not supported, or indices that are not
            integers.
        ValueError: the fast tower, which never has the probabilities in memory; a block, head or patch that does not
            exist, or none; an impossible option, or an image that cannot be used.
        OSError: a file that cannot be read.

    Warns:
        UserWarning: the result takes more than `WARN_BYTES`; the message has its size, before anything is computed.
    """
    tower, config = encoder.tower, encoder.config
    if not isinstance(tower, ReferenceTower):
        raise ValueError(
            "encoder: expected one with the reference tower, got the fast tower, which never has the probabilities in "
            "memory; load it with impl='reference'"
        )
    chosen_blocks = check_indices("blocks", blocks, config.depth)
    chosen_heads = check_indices("heads", range(config.num_heads) if heads is None else heads, config.num_heads)
    pixel_values, grid = encoder.image_processor([image], device=encoder.device, **options)
    _, rows, columns = grid[0].tolist()
    every_patch = [(row, column) for row in range(rows) for column in range(columns)]
    chosen = tuple(every_patch) if queries is None else _patches(queries, rows, columns)
    shape = (len(chosen_heads), len(chosen), rows, columns)
    computed = sorted(set(chosen_blocks))
    _warn_if_large(len(computed) * 4 * math.prod(shape))

    plan = GridPlan.build(grid, config, encoder.device)
    order = reading_order(grid, config).to(encoder.device)  # where the tower has each patch
    in_towers_order = order[[row * columns + column for row, column in chosen]]
    places = order.argsort()
    maps = {}
    inputs = iter_hidden_states(tower, tower.embed(pixel_values, plan), plan, computed)  # layer k is block k's input
    for block, x in zip(computed, inputs, strict=True):
        out = torch.zeros(shape, device=encoder.device)
        segments = tower.segments_of(block, plan)
        weights = cast(Block, tower.blocks[block])
        _fill(out.flatten(2), weights, x, plan, segments, chosen_heads, in_towers_order, places)
        maps[block] = out
    return AttentionMaps(
        tuple(maps[block] for block in chosen_blocks), chosen_blocks, chosen_heads, chosen, (rows, columns)
    )


def _fill(
    out: Tensor,
    block: Block,
    x: Tensor,
    plan: GridPlan,
    segments: Segments,
    heads: tuple[int, ...],
    queries: Tensor,
    places: Tensor,
) -> None:
    """Write a block's probabilities into zeros.

    Args:
        out: `[heads, queries, patches]` float32, patches in reading order.
        block: the block.
        x: its input, `[patches, hidden_size]`, in the tower's order.
        plan: the plan of the image.
        segments: the runs of patches that attend to one another.
        heads: the heads of `out`.
        queries: `[queries]` int64, the patches that attend, in the tower's order.
        places: `[patches]` int64, where each patch of the tower's order is in reading order.
    """
    q, k, _ = block.attn.project(block.norm1(x))
    q, k = (apply_rope(part, plan.cos, plan.sin)[:, list(heads)].transpose(0, 1).float() for part in (q, k))
    for first, end in zip(segments.cu_seqlens[:-1].tolist(), segments.cu_seqlens[1:].tolist(), strict=True):
        (which,) = torch.where((queries >= first) & (queries < end))
        if not len(which):
            continue
        heads_at_once = max(1, PIECE_BYTES // (4 * len(which) * (end - first)))
        queries_at_once = max(1, PIECE_BYTES // (4 * (end - first)))
        for some_heads in torch.arange(len(heads)).split(heads_at_once):
            piece = slice(int(some_heads[0]), int(some_heads[-1]) + 1)
            keys = k[piece, first:end].transpose(1, 2)
            for some in which.split(queries_at_once):
                out[piece, some[:, None], places[first:end]] = _softmax(q[piece, queries[some]], keys, block.attn.scale)


def _softmax(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the probabilities of float32 queries and transposed keys, in float32 also where autocast is on."""
    with torch.autocast(q.device.type, enabled=False):
        return (q @ keys).mul_(scale).softmax(-1)


def _patches(queries: Iterable[Patch], rows: int, columns: int) -> tuple[Patch, ...]:
    if not isinstance(queries, Iterable):
        raise TypeError(f"queries: expected a sequence of (row, column) of patches, got {queries!r}")
    chosen = []
    for query in queries:
        patch = check_integers("queries", query, "(row, column) of patches")
        if len(patch) != 2 or not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
            raise ValueError(f"queries: expected (row, column) in a grid of {rows} × {columns} patches, got {patch}")
        chosen.append((patch[0], patch[1]))
    if not chosen:
        raise ValueError("queries: expected at least one patch, got none; None means all")
    return tuple(chosen)


def _warn_if_large(size: int) -> None:
    if size > WARN_BYTES:
        warnings.warn(
            f"attention maps: {size / 2**30:.1f} GiB; fewer blocks, heads or queries, or max_tokens=, make it less",
            stacklevel=4,
        )
