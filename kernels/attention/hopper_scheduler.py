"""The tile scheduler of attention on Hopper: how segments are cut into tiles, and which tile has which number.

Programs take tile numbers from a counter (dynamic persistent scheduling) and compute from `cu_seqlens` which segment,
head and queries it means. A launch knows only the numbers of rows and segments, both of which may include padding.
"""

from functools import lru_cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

UNIT_QUERIES = gl.constexpr(64)
"""Queries of a unit, the part of a tile that one consumer computes."""
CONSUMERS = gl.constexpr(3)
"""Consumer warpgroups, and units of the tallest tile."""
SEGMENTS_PER_LOAD = gl.constexpr(128)
"""Segments whose bounds the producer's warp loads at once."""


@gluon.jit
def tile_heights(n_tokens, n_segments, H, n_programs):
    """Return the units of a tall tile and the number of heads that have tall tiles.

    Tiles of the other heads are one unit shorter. Heads are counted over all segments, which are taken as equally long.
    The choice gives the busiest program as few units as possible: one tile for each program, or waves of tiles of 3
    units of which the last one or two have tiles of 2 (TUNING.md). `tile_heights.fn` takes Python integers.
    """
    n_heads = n_segments * H
    n_units = (n_tokens + 64 * n_segments - 1) // (64 * n_segments)
    n_tall_tiles = (n_units + 2) // 3
    n_short_tiles = (n_units + 1) // 2
    tall_units = 3
    n_tall_heads = n_heads
    if n_heads * n_units <= n_programs:
        tall_units = 1
    elif n_heads * n_short_tiles <= n_programs:
        tall_units = 2
    elif n_heads * n_tall_tiles > n_programs:
        busiest_units = max((n_heads * n_units + n_programs - 1) // n_programs, 4)
        spare_tiles = -1
        while (spare_tiles < 0) & (busiest_units < 36):
            n_waves = (busiest_units + 2) // 3
            n_tall_heads = min(n_heads, (busiest_units - 2 * n_waves) * n_programs // n_tall_tiles)
            spare_tiles = n_waves * n_programs - n_tall_heads * n_tall_tiles - (n_heads - n_tall_heads) * n_short_tiles
            busiest_units += 1
        if spare_tiles < 0:
            n_tall_heads = n_heads
    return tall_units, n_tall_heads


@lru_cache(1024)
def saves_a_wave(n_tokens: int, H: int, n_programs: int) -> bool:
    """Return whether tiles that continue across heads take fewer waves of programs, for a single segment.

    They do at a few lengths: with 16 heads and 132 programs from 3073 to 3136 tokens, for example. A tile of two heads
    takes longer, and a kernel compiled for such tiles is slower where they save nothing (TUNING.md).
    """
    tall_units, n_tall_heads = tile_heights.fn(n_tokens, 1, H, n_programs)
    if tall_units < 3:
        return False
    n_units = -(-n_tokens // 64)
    n_tiles = n_tall_heads * -(-n_units // 3) + (H - n_tall_heads) * -(-n_units // 2)
    return -(-H * n_units // (3 * n_programs)) < -(-n_tiles // n_programs)


@gluon.jit
def tile_heights_of_batch(cu_seqlens_ptr, n_segments, S, H):
    """Return `tile_heights` of the actual tokens and segments, without padding, and whether segments differ in length.

    Programs compute it on the device, because a CUDA graph may have capacity for more rows and segments than it gets.
    """
    n_tokens = gl.minimum(gl.load(cu_seqlens_ptr + n_segments), S)
    n_used = n_segments
    longest = n_tokens
    if n_segments > 1:
        b_used = gl.zeros([SEGMENTS_PER_LOAD], gl.int32, gl.BlockedLayout([SEGMENTS_PER_LOAD // 32], [32], [1], [0]))
        b_longest = b_used
        for i in range(0, n_segments, SEGMENTS_PER_LOAD):
            o = i + gl.arange(0, SEGMENTS_PER_LOAD, layout=b_used.type.layout)
            b_start = gl.load(cu_seqlens_ptr + o, mask=o < n_segments, other=0)
            b_end = gl.load(cu_seqlens_ptr + o + 1, mask=o < n_segments, other=0)
            b_used += (b_end > b_start).to(gl.int32)
            b_longest = gl.maximum(b_longest, b_end - b_start)
        n_used = gl.sum(b_used, 0)
        longest = gl.max(b_longest, 0)
    tall_units, n_tall_heads = tile_heights(gl.maximum(n_tokens, 1), gl.maximum(n_used, 1), H, gl.num_programs(0))
    return tall_units, n_tall_heads, longest * n_used != n_tokens


@gluon.jit
def load_segment(
    cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, tall_units, n_tall_heads, ACROSS_HEADS: gl.constexpr
):
    """Return a segment's start, end and tiles; how many of its heads have tall tiles; tall and short tiles per head.

    `i_rank` is the number of segments scheduled before it.
    """
    i_segment = gl.minimum(i_segment, n_segments - 1)
    start = gl.load(cu_seqlens_ptr + i_segment)
    end = gl.minimum(gl.load(cu_seqlens_ptr + i_segment + 1), S)
    n_units = (end - start + UNIT_QUERIES - 1) // UNIT_QUERIES
    own_tall_heads = gl.minimum(gl.maximum(n_tall_heads - i_rank * H, 0), H)
    n_tall_tiles = gl.where(tall_units == 3, (n_units + 2) // 3, gl.where(tall_units == 2, (n_units + 1) // 2, n_units))
    n_short_tiles = gl.where(tall_units == 3, (n_units + 1) // 2, n_units)
    n_tiles = own_tall_heads * n_tall_tiles + (H - own_tall_heads) * n_short_tiles
    if ACROSS_HEADS:
        n_tiles = gl.where(n_units > 0, (H * gl.maximum(n_units, 2) + 2) // 3, 0)
    return start, end, n_tiles, own_tall_heads, n_tall_tiles, n_short_tiles


@gluon.jit
def next_segment(cu_seqlens_ptr, n_segments, S, i_segment, length, longest_first):
    """Return the segment scheduled after `i_segment`, which has `length` tokens.

    That is the next in memory, or with `longest_first` the next in descending order of length (ties by index).
    """
    i_next = i_segment + 1
    if longest_first:
        o = gl.arange(0, SEGMENTS_PER_LOAD, layout=gl.BlockedLayout([SEGMENTS_PER_LOAD // 32], [32], [1], [0]))
        b_start = gl.load(cu_seqlens_ptr + o, mask=o < n_segments, other=0)
        b_length = gl.minimum(gl.load(cu_seqlens_ptr + o + 1, mask=o < n_segments, other=0), S) - b_start
        m_after = (b_length < length) | ((b_length == length) & (o > i_segment))
        best = gl.max(gl.where(m_after, b_length * SEGMENTS_PER_LOAD + (SEGMENTS_PER_LOAD - 1 - o), 0), 0)
        # Below SEGMENTS_PER_LOAD the best length is 0: only empty segments remain.
        i_next = gl.where(best < SEGMENTS_PER_LOAD, n_segments, SEGMENTS_PER_LOAD - 1 - best % SEGMENTS_PER_LOAD)
    return i_next


@gluon.jit
def find_segment(
    cu_seqlens_ptr,
    n_segments,
    S,
    H,
    i_segment,
    i_rank,
    i_first_tile,
    i_tile,
    tall_units,
    n_tall_heads,
    longest_first,
    ACROSS_HEADS: gl.constexpr,
):
    """Return the segment of tile `i_tile`, the number of segments scheduled before it, and its first tile.

    The search starts at `i_segment`, `i_rank` and `i_first_tile`, which are those of an earlier tile.
    """
    start, end, n_tiles, _, _, _ = load_segment(
        cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, tall_units, n_tall_heads, ACROSS_HEADS
    )
    while (i_segment < n_segments) & (i_tile >= i_first_tile + n_tiles):
        i_first_tile += n_tiles
        i_rank += 1
        i_segment = next_segment(cu_seqlens_ptr, n_segments, S, i_segment, end - start, longest_first)
        start, end, n_tiles, _, _, _ = load_segment(
            cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, tall_units, n_tall_heads, ACROSS_HEADS
        )
    return i_segment, i_rank, i_first_tile
