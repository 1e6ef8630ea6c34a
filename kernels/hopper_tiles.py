"""What attention on Hopper loads and when: tiles, tickets, copies by TMA. `hopper_attention` has the whole picture.

Segment ends. Besides rows, heads and channels a descriptor has two dimensions that only move addresses, at coordinates
2³⁰ and `end` with strides of 2³⁴ - stride and stride elements. Modulo 2⁶⁴ bytes, they let row i of a segment that ends
at row `end` stand at coordinate 2³⁰ - length + i, so that the segment ends where the dimension of rows does, and TMA
itself reads zeros from there on: no neighbour's infinity ever comes in. (Triton's `tools/ragged_tma.py` does the same.)
"""

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

UNIT = gl.constexpr(64)
"""Queries of a unit."""
STEP = gl.constexpr(128)
"""Keys of a step. It orders the sums, so it is the same for all shapes."""
CONSUMERS = gl.constexpr(3)
"""Consumers, and units of the tallest tile."""
STAGES = gl.constexpr(3)
"""Steps of K and V that shared memory holds. A fourth fits: without turns it gained up to 4 %, less than turns did."""
END = gl.constexpr(2**30)
"""Coordinate at which every segment ends."""

_LAYOUTS = {64: gl.NVMMASharedLayout(128, 16, 5), 16: gl.NVMMASharedLayout(32, 16, 5)}


class _From:
    """A tensor from a byte on, as far as a launch asks for it: slicing it takes longer than the rest of the launch."""

    __slots__ = ("dtype", "offset", "x")

    def __init__(self, x: Tensor, offset: int) -> None:
        self.x = x  # kept alive until the launch
        self.offset = offset
        self.dtype = x.dtype

    def data_ptr(self) -> int:
        return self.x.data_ptr() + self.offset


class _Rows(TensorDescriptor):
    """A descriptor without the checks, which take longer than all the rest of it."""

    def __init__(self, base: _From, form: tuple) -> None:
        self.base = base
        self.shape, self.strides, self.block_shape, self.layout = form


@lru_cache(1024)
def _forms(shape: torch.Size, strides: tuple[int, ...], rows: int) -> tuple[tuple, tuple] | None:
    """Descriptors of `[S, H, D]` but for their addresses: 64 channels, and the rest. None if TMA cannot read them."""
    _, heads, channels = shape
    row, head, _ = strides
    if heads == 1:
        head = channels  # the stride of a single head may be anything
    if any(stride % 8 or not 0 < stride < 2**32 for stride in (row, head)):
        return None
    many = 2**31 - 2**16
    moves = [2**34 - row, row, head, row, 1]
    rest = channels % 64 or channels  # of 64 channels there is no rest, but a kernel's arguments are what they are
    first_form = ([many, many, heads, 2**30, channels - rest or rest], moves, [1, 1, 1, rows, 64], _LAYOUTS[64])
    return first_form, ([many, many, heads, 2**30, rest], moves, [1, 1, 1, rows, 16], _LAYOUTS[16])


def descriptors(x: Tensor | tuple[Tensor, Tensor], rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Boxes of `rows` rows of `x [S, H, D]`: 64 channels, and the rest. `x` may be these two, apart.

    Copied if TMA cannot address it: addresses and strides have to be multiples of 16 bytes.
    """
    if isinstance(x, tuple):
        return descriptors(x[0], rows)[0], descriptors(x[1], rows)[1]
    forms = _forms(x.shape, x.stride(), rows)
    if forms is None or x.data_ptr() % 16:
        return descriptors(x.clone(memory_format=torch.contiguous_format), rows)
    return _Rows(_From(x, 0), forms[0]), _Rows(_From(x, 128 if x.shape[2] > 64 else 0), forms[1])


@gluon.jit
def _segment(cu_seqlens_ptr, n_segments, S, H, i_segment, units, n_tall):
    """Bounds of a segment; how many of its heads have tall tiles; tiles of a head with tall ones, and with low ones."""
    i_segment = gl.minimum(i_segment, n_segments - 1)
    start = gl.load(cu_seqlens_ptr + i_segment)
    end = gl.minimum(gl.load(cu_seqlens_ptr + i_segment + 1), S)
    n_units = (end - start + UNIT - 1) // UNIT
    low = gl.maximum(units - 1, 1)
    tall_heads = gl.minimum(gl.maximum(n_tall - i_segment * H, 0), H)
    return start, end, tall_heads, (n_units + units - 1) // units, (n_units + low - 1) // low


@gluon.jit
def _find_segment(cu_seqlens_ptr, n_segments, S, H, i_segment, i_first, i_tile, units, n_tall):
    """The segment of tile `i_tile` and the number of its first tile, from those of an earlier tile."""
    _, _, tall_heads, n_tall_tiles, n_low_tiles = _segment(cu_seqlens_ptr, n_segments, S, H, i_segment, units, n_tall)
    n_tiles = tall_heads * n_tall_tiles + (H - tall_heads) * n_low_tiles
    while (i_segment < n_segments) & (i_tile >= i_first + n_tiles):
        i_first += n_tiles
        i_segment += 1
        _, _, tall_heads, n_tall_tiles, n_low_tiles = _segment(
            cu_seqlens_ptr, n_segments, S, H, i_segment, units, n_tall
        )
        n_tiles = tall_heads * n_tall_tiles + (H - tall_heads) * n_low_tiles
    return i_segment, i_first


@gluon.jit
def _write_ticket(ticket, n_steps, n_first_keys, i_row, n_rows, i_head):
    """Tell the consumers of a tile: steps, keys of the first one, first row of all, rows, head. No steps: the end."""
    o = gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [1], [0]))
    b_ticket = gl.where(o == 3, n_rows, i_head)
    b_ticket = gl.where(o == 2, i_row, b_ticket)
    b_ticket = gl.where(o == 1, n_first_keys, b_ticket)
    ticket.store(gl.where(o == 0, n_steps, b_ticket))


@gluon.jit
def _entry(b_ticket, INDEX: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, layout=b_ticket.type.layout) == INDEX, b_ticket, 0), 0)


@gluon.jit
def read_ticket(tickets, written, i_tile):
    """Each thread reads all of it, so that nothing is exchanged."""
    mbarrier.wait(written.index(i_tile & 1), (i_tile >> 1) & 1)
    b_ticket = tickets.index(i_tile & 1).load(gl.BlockedLayout([8], [32], [4], [0]))
    return _entry(b_ticket, 0), _entry(b_ticket, 1), _entry(b_ticket, 2), _entry(b_ticket, 3), _entry(b_ticket, 4)


@gluon.jit
def _copy(descriptors, b_first, b_rest, full, i_row, end, length, i_head, D: gl.constexpr):
    """Rows of one head from `i_row` of the segment on: 64 channels and the rest, zeros where there are no more."""
    first, rest = descriptors
    x = END - length + i_row
    b_first = b_first._reinterpret(first.dtype, first.block_shape, first.layout)
    tma.async_copy_global_to_shared(first, [END, end, i_head, x, 0], full, b_first)
    if D > 64:
        b_rest = b_rest._reinterpret(rest.dtype, rest.block_shape, rest.layout)
        tma.async_copy_global_to_shared(rest, [END, end, i_head, x, 0], full, b_rest)


@gluon.jit
def produce(state, q, k, v, cu_seqlens_ptr, counter_ptr, n_segments, S, units, n_tall, D: gl.constexpr):
    """The producer: tile after tile, tickets and copies, until there are no more."""
    H, tickets, q_tiles, k_tiles, v_tiles, written, q_full, q_empty, k_full, v_full, empty, _ = state
    ROW: gl.constexpr = 128 if D == 64 else 160
    i_tile = gl.program_id(0)
    i_segment = 0
    i_first = 0
    i_segment, i_first = _find_segment(cu_seqlens_ptr, n_segments, S, H, i_segment, i_first, i_tile, units, n_tall)
    i_step = 0
    i_done = 0
    while i_segment < n_segments:
        start, end, tall_heads, n_tall_tiles, n_low_tiles = _segment(
            cu_seqlens_ptr, n_segments, S, H, i_segment, units, n_tall
        )
        length = end - start
        i_here = i_tile - i_first
        i_head = 0
        n_tiles = n_tall_tiles
        if i_here >= tall_heads * n_tall_tiles:
            i_here -= tall_heads * n_tall_tiles
            i_head = tall_heads
            n_tiles = n_low_tiles
        i_head += i_here // n_tiles
        i_here = i_here % n_tiles
        n_units = (length + UNIT - 1) // UNIT
        each = n_units // n_tiles
        more = n_units % n_tiles  # as many tiles have a unit more than the others
        i_row = (i_here * each + gl.minimum(i_here, more)) * UNIT
        past = gl.minimum(((i_here + 1) * each + gl.minimum(i_here + 1, more)) * UNIT, length)
        n_steps = (length + STEP - 1) // STEP

        slot = i_done & 1
        mbarrier.wait(q_empty.index(slot), ((i_done >> 1) & 1) ^ 1)
        n_first_keys = length - (n_steps - 1) * STEP
        _write_ticket(tickets.index(slot), n_steps, n_first_keys, start + i_row, past - i_row, i_head)
        mbarrier.arrive(written.index(slot), count=1)
        mbarrier.expect(q_full.index(slot), CONSUMERS * UNIT * ROW)
        for i_consumer in gl.static_range(CONSUMERS):
            i = slot * CONSUMERS + i_consumer
            i_query = i_row + i_consumer * UNIT
            _copy(q, q_tiles[0].index(i), q_tiles[1].index(i), q_full.index(slot), i_query, end, length, i_head, D)
        for i_key in range((n_steps - 1) * STEP, -1, -STEP):
            # `empty` tells of a step's keys and of the values before them, and keys are copied before their values: so
            # the wait below, one step ahead, has also been the keys' own.
            i = i_step % STAGES
            i_step += 1
            mbarrier.expect(k_full.index(i), STEP * ROW)
            _copy(k, k_tiles[0].index(i), k_tiles[1].index(i), k_full.index(i), i_key, end, length, i_head, D)
            mbarrier.wait(empty.index(i_step % STAGES), ((i_step // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(i), STEP * ROW)
            _copy(v, v_tiles[0].index(i), v_tiles[1].index(i), v_full.index(i), i_key, end, length, i_head, D)
        i_done += 1
        if n_segments == 1:
            i_tile += gl.num_programs(0)
        else:
            i_tile = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        i_segment, i_first = _find_segment(cu_seqlens_ptr, n_segments, S, H, i_segment, i_first, i_tile, units, n_tall)
    mbarrier.wait(q_empty.index(i_done & 1), ((i_done >> 1) & 1) ^ 1)
    _write_ticket(tickets.index(i_done & 1), 0, 0, 0, 0, 0)
    mbarrier.arrive(written.index(i_done & 1), count=1)


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers in shared memory, each of which waits for ARRIVALS."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def tile_memory(COUNT: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr):
    """Shared memory for tiles of 64 channels and 16 more."""
    first = gl.allocate_shared_memory(dtype, [COUNT, ROWS, 64], gl.NVMMASharedLayout(128, 16, 2))
    rest = gl.allocate_shared_memory(dtype, [COUNT, ROWS, 16], gl.NVMMASharedLayout(32, 16, 2))
    return first, rest
