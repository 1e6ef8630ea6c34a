"""The producer of attention on Hopper: tickets, copies by TMA, and the barriers. `hopper.py` has the schedule.

A *ticket* is a tile's work descriptor: eight int32 in shared memory that the producer writes and the consumers read.

    0  n_steps             steps of keys; 0 says that there are no more tiles
    1  n_first_keys        keys of the first step, the only partial one
    2  stride              from one row of the output to the next
    3  n_rows              query rows of the tile
    4  i_out               where the tile's first row is in the output
    5  n_first_head_units  units of the tile's first head; those after it belong to the next head
    6  n_rows_next         n_rows for the units of the next head; like i_out_next it counts from the tile's first unit,
                           as if the next head started n_first_head_units before its first row
    7  i_out_next          i_out for the units of the next head

Places and strides of the output are in units of 16 bytes (8 elements).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from qwenvit.kernels.attention.gluon_versions import async_load, reinterpret
from qwenvit.kernels.attention.hopper_scheduler import (
    CONSUMERS,
    SEGMENTS_PER_LOAD,
    UNIT_QUERIES,
    find_segment,
    load_segment,
    next_segment,
    tile_heights_of_batch,
)

STEP_KEYS = gl.constexpr(128)
"""Keys of a step. It sets the order of the sums, so it is the same for all shapes."""
STAGES = gl.constexpr(3)
"""Pairs of K and V in shared memory. A fourth does not fit beside the outputs that are being stored (TUNING.md)."""
KV_EMPTY = gl.constexpr(8)
"""The first of STAGES named barriers, one for each stage: the consumers arrive, the producer waits. Triton uses the
numbers below 8 for partitions of a warp-specialized kernel."""
KV_EMPTY_THREADS = gl.constexpr(3 * 128 + 32)
END_COORDINATE = gl.constexpr(2**30)
"""Row coordinate at which every segment ends (`hopper_launch.py`)."""


@gluon.jit
def _named_barrier(INSTRUCTION: gl.constexpr, i_barrier, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Run an instruction on a named barrier of the hardware in every thread of a partition with this many WARPS.

    A named barrier costs a warp one instruction. An arrival at an mbarrier costs a barrier of the partition besides.
    """
    o = gl.full([32 * WARPS], i_barrier, gl.int32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.inline_asm_elementwise(
        f"{INSTRUCTION} $1, {THREADS}; mov.u32 $0, 0;", "=r,r", [o], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def barrier_sync(i_barrier, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Wait at a named barrier, with all of a partition's WARPS, until THREADS threads have arrived."""
    _named_barrier("bar.sync", i_barrier, THREADS, WARPS)


@gluon.jit
def barrier_arrive(i_barrier, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Arrive at a named barrier with all of a partition's WARPS, without waiting."""
    _named_barrier("bar.arrive", i_barrier, THREADS, WARPS)


@gluon.jit
def _write_ticket(ticket, n_steps, n_first_keys, stride, n_rows, i_out, n_first_head_units, n_rows_next, i_out_next):
    """Store a tile's ticket."""
    o = gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [1], [0]))
    b_ticket = gl.where(o == 6, n_rows_next, i_out_next)
    b_ticket = gl.where(o == 5, n_first_head_units, b_ticket)
    b_ticket = gl.where(o == 4, i_out, b_ticket)
    b_ticket = gl.where(o == 3, n_rows, b_ticket)
    b_ticket = gl.where(o == 2, stride, b_ticket)
    b_ticket = gl.where(o == 1, n_first_keys, b_ticket)
    ticket.store(gl.where(o == 0, n_steps, b_ticket))


@gluon.jit
def _ticket_field(b_ticket, INDEX: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, layout=b_ticket.type.layout) == INDEX, b_ticket, 0), 0)


@gluon.jit
def wait_for_ticket(tickets, ticket_full, i_ticket, I_CONSUMER: gl.constexpr, ACROSS_HEADS: gl.constexpr):
    """Wait for a ticket; return n_steps, n_first_keys, n_rows for this consumer's head, and n_first_head_units.

    Every thread loads the whole ticket, so that no threads have to exchange values.
    """
    mbarrier.wait(ticket_full.index(i_ticket & 1), (i_ticket >> 1) & 1)
    b_ticket = tickets.index(i_ticket & 1).load(gl.BlockedLayout([8], [32], [4], [0]))
    n_rows = _ticket_field(b_ticket, 3)
    n_first_head_units = _ticket_field(b_ticket, 5)
    if ACROSS_HEADS:
        n_rows = gl.where(n_first_head_units <= I_CONSUMER, _ticket_field(b_ticket, 6), n_rows)
    return _ticket_field(b_ticket, 0), _ticket_field(b_ticket, 1), n_rows, n_first_head_units


@gluon.jit
def read_output_location(tickets, i_ticket, I_CONSUMER: gl.constexpr, ACROSS_HEADS: gl.constexpr):
    """Return n_rows, i_out and stride of a ticket, for this consumer's head.

    Consumers call it after their last step, because no registers are free to keep the values until then.
    """
    b_ticket = tickets.index(i_ticket & 1).load(gl.BlockedLayout([8], [32], [4], [0]))
    n_rows, i_out = _ticket_field(b_ticket, 3), _ticket_field(b_ticket, 4)
    if ACROSS_HEADS:
        is_next_head = _ticket_field(b_ticket, 5) <= I_CONSUMER
        n_rows = gl.where(is_next_head, _ticket_field(b_ticket, 6), n_rows)
        i_out = gl.where(is_next_head, _ticket_field(b_ticket, 7), i_out)
    return n_rows, i_out, _ticket_field(b_ticket, 2)


@gluon.jit
def _copy_rows(descriptors, b_first, b_rest, full, i_row, end, length, i_head, D: gl.constexpr):
    """Start copies of one head's rows from the segment's row `i_row` on into shared memory; they complete `full`.

    `b_first` gets 64 channels, `b_rest` the others. Rows past the segment's end read as zeros.
    """
    first, rest = descriptors
    i_coordinate = END_COORDINATE - length + i_row
    b_first = reinterpret(b_first, first.dtype, first.block_shape, first.layout)
    async_load(first, [END_COORDINATE, end, i_head, i_coordinate, 0], full, b_first)
    if D > 64:
        b_rest = reinterpret(b_rest, rest.dtype, rest.block_shape, rest.layout)
        async_load(rest, [END_COORDINATE, end, i_head, i_coordinate, 0], full, b_rest)


@gluon.jit
def produce(
    shared, q, k, v, cu_seqlens_ptr, counters_ptr, n_segments, S, H, D: gl.constexpr, ACROSS_HEADS: gl.constexpr
):
    """Run the producer: take tiles until none are left, write their tickets, and copy their Q, K and V."""
    tickets, q_tiles, k_tiles, v_tiles, barriers = shared
    ticket_full, q_full, q_empty, kv_full = barriers
    ROW_BYTES: gl.constexpr = 128 if D == 64 else 160
    tall_units, n_tall_heads, lengths_differ = tile_heights_of_batch(cu_seqlens_ptr, n_segments, S, H)
    # The longest segments first: the last tiles are then short, and programs end together. Short segments have too few
    # tiles to pay for the search (TUNING.md).
    longest_first = lengths_differ & (n_segments <= SEGMENTS_PER_LOAD) & (512 * n_segments <= S) & (S < 2**24)
    o_lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    i_tile = gl.program_id(0)
    i_segment = next_segment(cu_seqlens_ptr, n_segments, S, -1, 2**24, longest_first)
    i_rank = 0
    i_first_tile = 0
    i_segment, i_rank, i_first_tile = find_segment(
        cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, i_first_tile, i_tile, tall_units, n_tall_heads,
        longest_first, ACROSS_HEADS,
    )  # fmt: skip
    i_pair = 0
    i_ticket = 0
    while i_segment < n_segments:
        start, end, n_tiles, own_tall_heads, n_tall_tiles, n_short_tiles = load_segment(
            cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, tall_units, n_tall_heads, ACROSS_HEADS
        )
        length = end - start
        n_units = (length + UNIT_QUERIES - 1) // UNIT_QUERIES
        i_own_tile = i_tile - i_first_tile
        i_head = 0
        n_first_head_units = CONSUMERS
        has_two_heads = 0
        if ACROSS_HEADS:
            n_units = gl.maximum(n_units, 2)  # so that no tile has three heads
            i_head = CONSUMERS * i_own_tile // n_units
            i_unit = CONSUMERS * i_own_tile % n_units
            n_first_head_units = gl.where(i_head + 1 < H, gl.minimum(n_units - i_unit, CONSUMERS), CONSUMERS)
            has_two_heads = (n_first_head_units < CONSUMERS).to(gl.int32)
            i_row = i_unit * UNIT_QUERIES
            row_end = gl.minimum(i_row + CONSUMERS * UNIT_QUERIES, length)
        else:
            n_tiles = n_tall_tiles
            if i_own_tile >= own_tall_heads * n_tall_tiles:
                i_own_tile -= own_tall_heads * n_tall_tiles
                i_head = own_tall_heads
                n_tiles = n_short_tiles
            i_head += i_own_tile // n_tiles
            i_own_tile = i_own_tile % n_tiles
            # A head's units are dealt evenly: its first `n_larger` tiles have one unit more than the others.
            tile_units = 1 + (n_units >= 2 * n_tiles).to(gl.int32) + (n_units >= 3 * n_tiles).to(gl.int32)
            n_larger = n_units - tile_units * n_tiles
            i_row = (i_own_tile * tile_units + gl.minimum(i_own_tile, n_larger)) * UNIT_QUERIES
            row_end = gl.minimum(
                ((i_own_tile + 1) * tile_units + gl.minimum(i_own_tile + 1, n_larger)) * UNIT_QUERIES, length
            )
        n_steps = (length + STEP_KEYS - 1) // STEP_KEYS

        i_slot = i_ticket & 1
        mbarrier.wait(q_empty.index(i_slot), ((i_ticket >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(i_slot), CONSUMERS * UNIT_QUERIES * ROW_BYTES)
        for i_consumer in gl.static_range(CONSUMERS):
            i_q = i_slot * CONSUMERS + i_consumer
            i_query = i_row + i_consumer * UNIT_QUERIES
            i_query_head = i_head
            if ACROSS_HEADS:
                i_query = gl.where(
                    i_consumer < n_first_head_units, i_query, (i_consumer - n_first_head_units) * UNIT_QUERIES
                )
                i_query_head += (i_consumer >= n_first_head_units).to(gl.int32)
            _copy_rows(
                q, q_tiles[0].index(i_q), q_tiles[1].index(i_q), q_full.index(i_slot), i_query, end, length,
                i_query_head, D,
            )  # fmt: skip
        n_first_keys = length - (n_steps - 1) * STEP_KEYS
        stride = H * (D // 8)
        i_out = (start + i_row) * stride + i_head * (D // 8)
        n_rows_next = length + n_first_head_units * UNIT_QUERIES
        i_out_next = (start - n_first_head_units * UNIT_QUERIES) * stride + (i_head + 1) * (D // 8)
        ticket = tickets.index(i_slot)
        _write_ticket(
            ticket, n_steps, n_first_keys, stride, row_end - i_row, i_out, n_first_head_units, n_rows_next, i_out_next
        )
        mbarrier.arrive(ticket_full.index(i_slot), count=1)
        b_taken = o_lane
        n_copies = (n_steps + 1) << has_two_heads
        for i_copy in range(n_copies):  # pairs of two heads alternate
            i_own_pair = i_copy >> has_two_heads
            i_key = (n_steps - 1 - i_own_pair) * STEP_KEYS
            i_key_head = i_head + (i_copy & has_two_heads)
            i_stage = i_pair % STAGES
            # Take the next tile as late as its number can still arrive in time: programs that are behind then take
            # fewer tiles (TUNING.md). The lanes other than the first take nothing.
            m_take = (o_lane == 0) & (i_copy == n_copies - 1)
            b_taken = gl.atomic_add(counters_ptr + o_lane, o_lane + 1, mask=m_take, sem="relaxed")
            if i_pair >= STAGES:
                barrier_sync(KV_EMPTY + i_stage, KV_EMPTY_THREADS, 1)
            if (i_own_pair > 0) & (i_own_pair < n_steps):
                mbarrier.expect(kv_full.index(i_stage), 2 * STEP_KEYS * ROW_BYTES)
            else:
                mbarrier.expect(kv_full.index(i_stage), STEP_KEYS * ROW_BYTES)
            if i_own_pair > 0:
                _copy_rows(
                    v, v_tiles[0].index(i_stage), v_tiles[1].index(i_stage), kv_full.index(i_stage), i_key + STEP_KEYS,
                    end, length, i_key_head, D,
                )  # fmt: skip
            if i_own_pair < n_steps:
                _copy_rows(
                    k, k_tiles[0].index(i_stage), k_tiles[1].index(i_stage), kv_full.index(i_stage), i_key,
                    end, length, i_key_head, D,
                )  # fmt: skip
            i_pair += 1
        i_ticket += 1
        i_tile = gl.num_programs(0) + gl.sum(gl.where(o_lane == 0, b_taken, 0), 0)
        i_segment, i_rank, i_first_tile = find_segment(
            cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, i_first_tile, i_tile, tall_units, n_tall_heads,
            longest_first, ACROSS_HEADS,
        )  # fmt: skip
    mbarrier.wait(q_empty.index(i_ticket & 1), ((i_ticket >> 1) & 1) ^ 1)
    _write_ticket(tickets.index(i_ticket & 1), 0, 0, 0, 0, 0, 0, 0, 0)
    mbarrier.arrive(ticket_full.index(i_ticket & 1), count=1)
    for i_last_pair in range(gl.maximum(i_pair - STAGES, 0), i_pair):  # leave no arrivals behind
        barrier_sync(KV_EMPTY + i_last_pair % STAGES, KV_EMPTY_THREADS, 1)
    # The last program to finish resets the counters for the next launch: no program takes tiles any more.
    if gl.atomic_add(counters_ptr + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        gl.store(counters_ptr, 0)
        gl.store(counters_ptr + 1, 0)


@gluon.jit
def make_barriers():
    """Allocate and initialise the barriers: ticket_full, q_full, q_empty and kv_full."""
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    ticket_full = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    kv_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    # Triton synchronises all threads between two initialisations in the same array, so arrays are interleaved.
    for i in gl.static_range(STAGES):
        if i < 2:
            mbarrier.init(ticket_full.index(i), count=1)
            mbarrier.init(q_full.index(i), count=1)
            mbarrier.init(q_empty.index(i), count=CONSUMERS)
        mbarrier.init(kv_full.index(i), count=1)
    return ticket_full, q_full, q_empty, kv_full


@gluon.jit
def allocate_tiles(COUNT: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr):
    """Allocate shared memory for COUNT tiles: [COUNT, ROWS, 64], and [COUNT, ROWS, 16] for the channels beyond 64."""
    first = gl.allocate_shared_memory(dtype, [COUNT, ROWS, 64], gl.NVMMASharedLayout(128, 16, 2))
    rest = gl.allocate_shared_memory(dtype, [COUNT, ROWS, 16], gl.NVMMASharedLayout(32, 16, 2))
    return first, rest
