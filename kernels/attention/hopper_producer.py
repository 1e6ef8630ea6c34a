"""What attention on Hopper loads and when: tiles, tickets, copies by TMA. `hopper_attention` has the whole picture."""

from functools import lru_cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

UNIT = gl.constexpr(64)
"""Queries of a unit."""
STEP = gl.constexpr(128)
"""Keys of a step. It orders the sums, so it is the same for all shapes."""
CONSUMERS = gl.constexpr(3)
"""Consumers, and units of the tallest tile."""
STAGES = gl.constexpr(3)
"""Steps of K and V that shared memory holds. A fourth does not fit beside outputs on their way; with turns it gained
nothing, without them up to 4 %, less than turns did."""
SEGMENTS = gl.constexpr(128)
"""Segments that the producer's warp looks at in one go."""
END = gl.constexpr(2**30)
"""Coordinate at which every segment ends."""


@gluon.jit
def tile_heights(n_tokens, n_segments, H, n_programs):
    """Units of tall tiles, and how many heads have them, counted over all segments; the others' are a unit lower.

    As few units as can be for the busiest program, if all segments were equally long: one tile for each, or rounds of
    tiles of 3 units, the last one or two of them of 2. On an H200 at head_dim 80 against tall tiles alone, 1024 tokens
    took 19.3 µs and not 23.2, 2304 67.3 and 74.4, 4096 169 and 180, 7056 504 and 521. Of many tiles a program it gained
    nothing. Programs find it themselves, from what is there: 6240 tokens of head_dim 72 where there is room for 6400
    took 344 µs so, and 396 in tiles for 6400. `tile_heights.fn` is the same for Python's integers.
    """
    heads = n_segments * H
    n_units = (n_tokens + 64 * n_segments - 1) // (64 * n_segments)
    n_high = (n_units + 2) // 3
    n_low = (n_units + 1) // 2
    units = 3
    n_tall = heads
    if heads * n_units <= n_programs:
        units = 1
    elif heads * n_low <= n_programs:
        units = 2
    elif heads * n_high > n_programs:
        most = max((heads * n_units + n_programs - 1) // n_programs, 4)  # units of the busiest program
        left = -1
        while (left < 0) & (most < 36):
            rounds = (most + 2) // 3
            n_tall = min(heads, (most - 2 * rounds) * n_programs // n_high)
            left = rounds * n_programs - n_tall * n_high - (heads - n_tall) * n_low
            most += 1
        if left < 0:
            n_tall = heads
    return units, n_tall


@lru_cache(1024)
def saves_a_wave(n_tokens: int, H: int, n_programs: int) -> bool:
    """Whether tiles of a single segment that run on from head to head take fewer rounds of all programs.

    They do at some lengths: with 16 heads on an H200 from 3073 to 3136 tokens (262 tiles in two rounds, not 344 in
    three), from 4609 to 4736, around 9472 and so on. Measured at 3136: 103 µs and not 117 at head_dim 72, 98 and 117 at
    80, 87 and 111 at 64; since then who passes over a step waits for its values too, which takes 2 µs more at 72. A
    tile of two heads takes longer, and a kernel that knows of them is up to 2 % slower elsewhere: also where there is
    room for such a length, and the segment is shorter.
    """
    units, n_tall = tile_heights.fn(n_tokens, 1, H, n_programs)
    if units < 3:
        return False
    n_units = -(-n_tokens // 64)
    n_tiles = n_tall * -(-n_units // 3) + (H - n_tall) * -(-n_units // 2)
    return -(-H * n_units // (3 * n_programs)) < -(-n_tiles // n_programs)


@gluon.jit
def used_heights(cu_seqlens_ptr, n_segments, S, H):
    """`tile_heights` for what is there, as rows and segments may be room to spare; and whether lengths differ."""
    n_tokens = gl.minimum(gl.load(cu_seqlens_ptr + n_segments), S)
    n_used = n_segments  # one, or as many as are not empty
    longest = n_tokens
    if n_segments > 1:
        b_used = gl.zeros([SEGMENTS], gl.int32, gl.BlockedLayout([SEGMENTS // 32], [32], [1], [0]))
        b_longest = b_used
        for i in range(0, n_segments, SEGMENTS):
            o = i + gl.arange(0, SEGMENTS, layout=b_used.type.layout)
            b_start = gl.load(cu_seqlens_ptr + o, mask=o < n_segments, other=0)
            b_end = gl.load(cu_seqlens_ptr + o + 1, mask=o < n_segments, other=0)
            b_used += (b_end > b_start).to(gl.int32)
            b_longest = gl.maximum(b_longest, b_end - b_start)
        n_used = gl.sum(b_used, 0)
        longest = gl.max(b_longest, 0)
    units, n_tall = tile_heights(gl.maximum(n_tokens, 1), gl.maximum(n_used, 1), H, gl.num_programs(0))
    return units, n_tall, longest * n_used != n_tokens


@gluon.jit
def _segment(cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, units, n_tall, ACROSS: gl.constexpr):
    """Bounds and tiles of a segment; how many heads have tall ones; tiles of a head with these, and with low ones."""
    i_segment = gl.minimum(i_segment, n_segments - 1)
    start = gl.load(cu_seqlens_ptr + i_segment)
    end = gl.minimum(gl.load(cu_seqlens_ptr + i_segment + 1), S)
    n_units = (end - start + UNIT - 1) // UNIT
    tall_heads = gl.minimum(gl.maximum(n_tall - i_rank * H, 0), H)
    n_high = gl.where(units == 3, (n_units + 2) // 3, gl.where(units == 2, (n_units + 1) // 2, n_units))
    n_low = gl.where(units == 3, (n_units + 1) // 2, n_units)
    n_tiles = tall_heads * n_high + (H - tall_heads) * n_low
    if ACROSS:
        n_tiles = gl.where(n_units > 0, (H * gl.maximum(n_units, 2) + 2) // 3, 0)
    return start, end, n_tiles, tall_heads, n_high, n_low


@gluon.jit
def _next_segment(cu_seqlens_ptr, n_segments, S, i_segment, length, by_length):
    """The next segment, as they lie or the longest of those shorter than `i_segment`, or as long and behind it."""
    i_next = i_segment + 1
    if by_length:
        o = gl.arange(0, SEGMENTS, layout=gl.BlockedLayout([SEGMENTS // 32], [32], [1], [0]))
        b_start = gl.load(cu_seqlens_ptr + o, mask=o < n_segments, other=0)
        b_length = gl.minimum(gl.load(cu_seqlens_ptr + o + 1, mask=o < n_segments, other=0), S) - b_start
        m_after = (b_length < length) | ((b_length == length) & (o > i_segment))
        best = gl.max(gl.where(m_after, b_length * SEGMENTS + (SEGMENTS - 1 - o), 0), 0)
        i_next = gl.where(best < SEGMENTS, n_segments, SEGMENTS - 1 - best % SEGMENTS)  # what is left may be empty
    return i_next


@gluon.jit
def _find_segment(
    cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, i_first, i_tile, units, n_tall, by_length, ACROSS: gl.constexpr
):
    """The segment of tile `i_tile`, how many come before it, and its first tile, from those of an earlier tile."""
    start, end, n_tiles, _, _, _ = _segment(cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, units, n_tall, ACROSS)
    while (i_segment < n_segments) & (i_tile >= i_first + n_tiles):
        i_first += n_tiles
        i_rank += 1
        i_segment = _next_segment(cu_seqlens_ptr, n_segments, S, i_segment, end - start, by_length)
        start, end, n_tiles, _, _, _ = _segment(
            cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, units, n_tall, ACROSS
        )
    return i_segment, i_rank, i_first


@gluon.jit
def _write_ticket(ticket, n_steps, n_first_keys, stride, n_rows, i_out, n_here, n_rows_next, i_out_next):
    """Tell the consumers of a tile: steps, keys of the first one; rows, and where these go. No steps: the end.

    From unit `n_here` on its rows are the next head's, counted as if that began so many units before.
    """
    o = gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [1], [0]))
    b_ticket = gl.where(o == 6, n_rows_next, i_out_next)
    b_ticket = gl.where(o == 5, n_here, b_ticket)
    b_ticket = gl.where(o == 4, i_out, b_ticket)
    b_ticket = gl.where(o == 3, n_rows, b_ticket)
    b_ticket = gl.where(o == 2, stride, b_ticket)
    b_ticket = gl.where(o == 1, n_first_keys, b_ticket)
    ticket.store(gl.where(o == 0, n_steps, b_ticket))


@gluon.jit
def _entry(b_ticket, INDEX: gl.constexpr):
    return gl.sum(gl.where(gl.arange(0, 8, layout=b_ticket.type.layout) == INDEX, b_ticket, 0), 0)


@gluon.jit
def read_work(tickets, written, i_tile, SELF: gl.constexpr, ACROSS: gl.constexpr):
    """Steps, keys of the first one, rows; units of the first head. Each thread reads it all: nothing is exchanged."""
    mbarrier.wait(written.index(i_tile & 1), (i_tile >> 1) & 1)
    b_ticket = tickets.index(i_tile & 1).load(gl.BlockedLayout([8], [32], [4], [0]))
    n_rows = _entry(b_ticket, 3)
    n_here = _entry(b_ticket, 5)
    if ACROSS:
        n_rows = gl.where(n_here <= SELF, _entry(b_ticket, 6), n_rows)
    return _entry(b_ticket, 0), _entry(b_ticket, 1), n_rows, n_here


@gluon.jit
def read_place(tickets, i_tile, SELF: gl.constexpr, ACROSS: gl.constexpr):
    """Rows, where they go, and their stride, in 16 bytes: read last, since no register could hold them until then."""
    b_ticket = tickets.index(i_tile & 1).load(gl.BlockedLayout([8], [32], [4], [0]))
    n_rows, i_out = _entry(b_ticket, 3), _entry(b_ticket, 4)
    if ACROSS:
        is_next = _entry(b_ticket, 5) <= SELF
        n_rows = gl.where(is_next, _entry(b_ticket, 6), n_rows)
        i_out = gl.where(is_next, _entry(b_ticket, 7), i_out)
    return n_rows, i_out, _entry(b_ticket, 2)


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
def produce(state, q, k, v, cu_seqlens_ptr, counter_ptr, n_segments, S, H, D: gl.constexpr, ACROSS: gl.constexpr):
    """The producer: tile after tile, tickets and copies, until there are no more."""
    tickets, q_tiles, k_tiles, v_tiles, barriers = state
    written, q_full, q_empty, k_full, v_full, empty, _ = barriers
    ROW: gl.constexpr = 128 if D == 64 else 160
    units, n_tall, differ = used_heights(cu_seqlens_ptr, n_segments, S, H)
    # Longest segments first, so that the last tiles are short and programs end together, where a segment's tiles are
    # enough to make up for the search: 40 of 4 to 2000 tokens took 727 µs and not 737, but 100 of 16 to 115 57 and 42.
    by_length = differ & (n_segments <= SEGMENTS) & (512 * n_segments <= S) & (S < 2**24)
    o_lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    i_tile = gl.program_id(0)
    i_segment = _next_segment(cu_seqlens_ptr, n_segments, S, -1, 2**24, by_length)
    i_rank = 0
    i_first = 0
    i_segment, i_rank, i_first = _find_segment(
        cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, i_first, i_tile, units, n_tall, by_length, ACROSS
    )
    i_step = 0
    i_done = 0
    while i_segment < n_segments:
        start, end, n_tiles, tall_heads, n_tall_tiles, n_low_tiles = _segment(
            cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, units, n_tall, ACROSS
        )
        length = end - start
        n_units = (length + UNIT - 1) // UNIT
        i_here = i_tile - i_first
        i_head = 0
        n_here = CONSUMERS
        is_split = 0
        if ACROSS:
            n_units = gl.maximum(n_units, 2)  # so that no tile has three heads
            i_head = CONSUMERS * i_here // n_units
            i_unit = CONSUMERS * i_here % n_units
            n_here = gl.where(i_head + 1 < H, gl.minimum(n_units - i_unit, CONSUMERS), CONSUMERS)
            is_split = (n_here < CONSUMERS).to(gl.int32)
            i_row = i_unit * UNIT
            past = gl.minimum(i_row + CONSUMERS * UNIT, length)
        else:
            n_tiles = n_tall_tiles
            if i_here >= tall_heads * n_tall_tiles:
                i_here -= tall_heads * n_tall_tiles
                i_head = tall_heads
                n_tiles = n_low_tiles
            i_head += i_here // n_tiles
            i_here = i_here % n_tiles
            each = 1 + (n_units >= 2 * n_tiles).to(gl.int32) + (n_units >= 3 * n_tiles).to(gl.int32)
            more = n_units - each * n_tiles  # as many tiles have a unit more than the others
            i_row = (i_here * each + gl.minimum(i_here, more)) * UNIT
            past = gl.minimum(((i_here + 1) * each + gl.minimum(i_here + 1, more)) * UNIT, length)
        n_steps = (length + STEP - 1) // STEP

        slot = i_done & 1
        mbarrier.wait(q_empty.index(slot), ((i_done >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), CONSUMERS * UNIT * ROW)
        for i_consumer in gl.static_range(CONSUMERS):
            i = slot * CONSUMERS + i_consumer
            i_query = i_row + i_consumer * UNIT
            i_of = i_head
            if ACROSS:
                i_query = gl.where(i_consumer < n_here, i_query, (i_consumer - n_here) * UNIT)
                i_of += (i_consumer >= n_here).to(gl.int32)
            _copy(q, q_tiles[0].index(i), q_tiles[1].index(i), q_full.index(slot), i_query, end, length, i_of, D)
        n_first_keys = length - (n_steps - 1) * STEP
        stride = H * (D // 8)
        i_out = (start + i_row) * stride + i_head * (D // 8)
        n_rows_next = length + n_here * UNIT
        i_out_next = (start - n_here * UNIT) * stride + (i_head + 1) * (D // 8)
        ticket = tickets.index(slot)
        _write_ticket(ticket, n_steps, n_first_keys, stride, past - i_row, i_out, n_here, n_rows_next, i_out_next)
        mbarrier.arrive(written.index(slot), count=1)
        b_taken = o_lane
        for i_copy in range(n_steps << is_split):  # of two heads by turns
            i_key = (n_steps - 1 - (i_copy >> is_split)) * STEP
            i_of = i_head + (i_copy & is_split)
            # `empty` tells of a step's keys and of the values before them, and keys are copied before their values: so
            # the wait below, one step ahead, has also been the keys' own.
            i = i_step % STAGES
            i_step += 1
            # The next tile, asked for as late as the answer can still be there in time, so that who is behind takes
            # fewer: a tile earlier, segments of 3136, 784 and 1764 tokens took 12 % longer.
            m_last = (o_lane == 0) & (i_copy == (n_steps << is_split) - 1)
            b_taken = gl.atomic_add(counter_ptr + o_lane, o_lane + 1, mask=m_last, sem="relaxed")
            mbarrier.expect(k_full.index(i), STEP * ROW)
            _copy(k, k_tiles[0].index(i), k_tiles[1].index(i), k_full.index(i), i_key, end, length, i_of, D)
            mbarrier.wait(empty.index(i_step % STAGES), ((i_step // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(i), STEP * ROW)
            _copy(v, v_tiles[0].index(i), v_tiles[1].index(i), v_full.index(i), i_key, end, length, i_of, D)
        i_done += 1
        i_tile = gl.num_programs(0) + gl.sum(gl.where(o_lane == 0, b_taken, 0), 0)
        i_segment, i_rank, i_first = _find_segment(
            cu_seqlens_ptr, n_segments, S, H, i_segment, i_rank, i_first, i_tile, units, n_tall, by_length, ACROSS
        )
    mbarrier.wait(q_empty.index(i_done & 1), ((i_done >> 1) & 1) ^ 1)
    _write_ticket(tickets.index(i_done & 1), 0, 0, 0, 0, 0, 0, 0, 0)
    mbarrier.arrive(written.index(i_done & 1), count=1)
    # Every program has taken its last: the one that says so last leaves the counters to the next launch.
    if gl.atomic_add(counter_ptr + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)
        gl.store(counter_ptr + 1, 0)


@gluon.jit
def make_barriers():
    """All barriers in shared memory: `written`, `q_full`, `q_empty`, `k_full`, `v_full`, `empty`, `turns`."""
    SLOT: gl.constexpr = mbarrier.MBarrierLayout()
    written = gl.allocate_shared_memory(gl.int64, [2, 1], SLOT)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], SLOT)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], SLOT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], SLOT)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], SLOT)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], SLOT)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], SLOT)
    # Between two of the same array triton makes all threads wait, so each array's first ones go first.
    for i in gl.static_range(STAGES):
        if i < 2:
            mbarrier.init(written.index(i), count=1)
            mbarrier.init(q_full.index(i), count=1)
            mbarrier.init(q_empty.index(i), count=CONSUMERS)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
        if i < CONSUMERS:
            mbarrier.init(turns.index(i), count=1)
    return written, q_full, q_empty, k_full, v_full, empty, turns


@gluon.jit
def tile_memory(COUNT: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr):
    """Shared memory for tiles of 64 channels and 16 more."""
    first = gl.allocate_shared_memory(dtype, [COUNT, ROWS, 64], gl.NVMMASharedLayout(128, 16, 2))
    rest = gl.allocate_shared_memory(dtype, [COUNT, ROWS, 16], gl.NVMMASharedLayout(32, 16, 2))
    return first, rest
