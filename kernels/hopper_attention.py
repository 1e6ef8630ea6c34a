"""Attention within segments of any length on Hopper, in Gluon: the same operation as `long_attention`, faster there.

One program runs on each multiprocessor, as three consumer warpgroups and one producer warp. The producer copies tiles
of Q, K and V into shared memory by TMA. A consumer takes 64 queries of one head, a *unit*, and walks over all keys of
the segment; the three of a program share the keys. While one exponentiates, the others keep the tensor cores busy:

    producer     wait until all have read a stage; copy 128 keys or values into it
    consumers    out += P V;  S = Q K^T;  P = 2^(S - maximum), out and sum rescaled;  next stage

Shares. Units are numbered by segment, head, and rows, and weighed by the key tiles that they meet. Each program finds
from `cu_seqlens` alone which run of units is its own, so that all programs weigh the same to within one unit, whatever
the lengths: nothing is counted in memory, and nothing about the lengths is known at launch.

Segment ends. Descriptors carry two more dimensions whose strides cancel (2^30 * (2^34 - stride) is 0 modulo 2^64 once
both are added up), so that the address of a row is right while its coordinate ends at 2^30 where the segment ends: TMA
itself reads zeros there, and a neighbour's infinities never come in. The last, partial key tile goes first; the loop
over the others needs no mask. Its order depends on nothing but the segment's length: the same bits alone or not.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = 1.4426950408889634
UNIT = gl.constexpr(64)
"""Queries of a consumer."""
BLOCK_N = gl.constexpr(128)
"""Keys of a tile. It orders the sums, so it is the same for all shapes."""
END = gl.constexpr(2**30)
"""Coordinate at which every segment ends."""
CONSUMERS = gl.constexpr(3)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _pack(b_p, dtype: gl.constexpr):
    """[rows, N] fp32 -> [rows, N / 2] int32 of 16-bit pairs: carried round a loop, 16-bit values take a register each."""
    b_low, b_high = gl.split(gl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // 2, 2]))
    cvt: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(cvt, "=r,f,f", [b_low, b_high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(b_x, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    b_low, b_high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [b_x], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    b_p = gl.reshape(gl.join(b_low, b_high), [b_x.shape[0], 2 * b_x.shape[1]]).to(dtype, bitcast=True)
    return gl.convert_layout(b_p, LAYOUT, assert_trivial=True)


@gluon.jit
def _tiles_of(cu_seqlens_ptr, n_segments, S, H, i_segment, tall, n_tall):
    """A segment's bounds and units, how many of its heads have tall tiles, and each head's tiles, tall or short."""
    i_segment = gl.minimum(i_segment, n_segments - 1)
    start = gl.load(cu_seqlens_ptr + i_segment)
    end = gl.minimum(gl.load(cu_seqlens_ptr + i_segment + 1), S)
    n_units = (end - start + UNIT - 1) // UNIT
    short = gl.maximum(tall - 1, 1)
    heads = gl.minimum(gl.maximum(n_tall - i_segment * H, 0), H)
    return start, end, n_units, heads, (n_units + tall - 1) // tall, (n_units + short - 1) // short


@gluon.jit
def _walk(cu_seqlens_ptr, n_segments, S, H, i_segment, i_first, i_tile, tall, n_tall):
    """The segment that tile `i_tile` belongs to and the number of its first tile, from those of an earlier tile."""
    start, end, n_units, heads, n_high, n_low = _tiles_of(cu_seqlens_ptr, n_segments, S, H, i_segment, tall, n_tall)
    n_tiles = heads * n_high + (H - heads) * n_low
    while (i_segment < n_segments) & (i_tile >= i_first + n_tiles):
        i_first += n_tiles
        i_segment += 1
        start, end, n_units, heads, n_high, n_low = _tiles_of(cu_seqlens_ptr, n_segments, S, H, i_segment, tall, n_tall)
        n_tiles = heads * n_high + (H - heads) * n_low
    return i_segment, i_first


@gluon.jit
def _post(ticket, n_steps, n_keys, i_row, n_rows, i_head):
    o = gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [1], [0]))
    b_ticket = gl.where(o == 0, n_steps, gl.where(o == 1, n_keys, gl.where(o == 2, i_row, gl.where(o == 3, n_rows, i_head))))
    ticket.store(b_ticket)


@gluon.jit
def _read(tickets, posted, i_pass):
    mbarrier.wait(posted.index(i_pass & 1), (i_pass >> 1) & 1)
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    b_ticket = tickets.index(i_pass & 1).load(LAYOUT)
    o = gl.arange(0, 8, layout=LAYOUT)
    return (gl.sum(gl.where(o == 0, b_ticket, 0), 0), gl.sum(gl.where(o == 1, b_ticket, 0), 0),
            gl.sum(gl.where(o == 2, b_ticket, 0), 0), gl.sum(gl.where(o == 3, b_ticket, 0), 0),
            gl.sum(gl.where(o == 4, b_ticket, 0), 0))


@gluon.jit
def _copy(descriptors, tiles, full, i_row, end, length, i_head, D: gl.constexpr, ROWS: gl.constexpr):
    """Rows of one head, 64 channels and 16 more, zeros where the segment or the head has no more."""
    head, tail = descriptors
    to_head, to_tail = tiles
    x = END - length + i_row
    b16: gl.constexpr = head.dtype
    tma.async_copy_global_to_shared(
        head, [END, end, i_head, x, 0], full, to_head._reinterpret(b16, [1, 1, 1, ROWS, 64], head.layout)
    )
    if D > 64:
        tma.async_copy_global_to_shared(
            tail, [END, end, i_head, x, 64], full, to_tail._reinterpret(b16, [1, 1, 1, ROWS, 16], tail.layout)
        )


@gluon.jit
def _produce(inputs, descriptors, cu_seqlens_ptr, counter_ptr, n_segments, S, tall, n_tall, D: gl.constexpr,
             STAGES: gl.constexpr):
    q, q_tail, k, k_tail, v, v_tail = descriptors
    H, tickets, tiles, barriers = inputs
    q_tiles, q_tails, k_tiles, k_tails, v_tiles, v_tails = tiles
    posted, q_full, q_empty, k_full, v_full, empty, turns = barriers
    ROW: gl.constexpr = 128 if D == 64 else 160
    i_tile = gl.program_id(0)
    i_segment = 0
    i_first = 0
    i_segment, i_first = _walk(cu_seqlens_ptr, n_segments, S, H, i_segment, i_first, i_tile, tall, n_tall)
    i_step = 0
    i_pass = 0
    while i_segment < n_segments:
        start, end, n_units, heads, n_high, n_low = _tiles_of(cu_seqlens_ptr, n_segments, S, H, i_segment, tall, n_tall)
        length = end - start
        i_here = i_tile - i_first
        n_tiles = n_high
        i_head = 0
        if i_here >= heads * n_high:
            i_here -= heads * n_high
            i_head = heads
            n_tiles = n_low
        i_head += i_here // n_tiles
        i_here = i_here % n_tiles
        each = n_units // n_tiles
        more = n_units % n_tiles  # that many tiles have a unit more
        i_row = (i_here * each + gl.minimum(i_here, more)) * UNIT
        n_rows = gl.minimum(((i_here + 1) * each + gl.minimum(i_here + 1, more)) * UNIT, length) - i_row
        n_steps = (length + BLOCK_N - 1) // BLOCK_N

        i_q = i_pass & 1
        mbarrier.wait(q_empty.index(i_q), ((i_pass >> 1) & 1) ^ 1)
        _post(tickets.index(i_q), n_steps, length - (n_steps - 1) * BLOCK_N, start + i_row, n_rows, i_head)
        mbarrier.arrive(posted.index(i_q), count=1)
        mbarrier.expect(q_full.index(i_q), CONSUMERS * UNIT * ROW)
        for i_consumer in gl.static_range(CONSUMERS):
            i = i_q * CONSUMERS + i_consumer
            _copy((q, q_tail), (q_tiles.index(i), q_tails.index(i)), q_full.index(i_q),
                  i_row + i_consumer * UNIT, end, length, i_head, D, UNIT)
        for i_key in range(n_steps):
            i = i_step % STAGES
            o_key = (n_steps - 1 - i_key) * BLOCK_N
            mbarrier.expect(k_full.index(i), BLOCK_N * ROW)
            _copy((k, k_tail), (k_tiles.index(i), k_tails.index(i)), k_full.index(i), o_key, end, length, i_head, D, BLOCK_N)
            mbarrier.wait(empty.index((i_step + 1) % STAGES), (((i_step + 1) // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(i), BLOCK_N * ROW)
            _copy((v, v_tail), (v_tiles.index(i), v_tails.index(i)), v_full.index(i), o_key, end, length, i_head, D, BLOCK_N)
            i_step += 1
        i_pass += 1
        if n_segments == 1:
            i_tile += gl.num_programs(0)
        else:
            i_tile = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        i_segment, i_first = _walk(cu_seqlens_ptr, n_segments, S, H, i_segment, i_first, i_tile, tall, n_tall)
    mbarrier.wait(q_empty.index(i_pass & 1), ((i_pass >> 1) & 1) ^ 1)
    _post(tickets.index(i_pass & 1), 0, 0, 0, 0, 0)
    mbarrier.arrive(posted.index(i_pass & 1), count=1)


@gluon.jit
def _scores(b_q, b_q_tail, b_k, b_k_tail, b_zero, D: gl.constexpr):
    """Products of a unit's queries and a tile's keys: [UNIT, BLOCK_N], not scaled yet."""
    b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    if D > 64:
        b_s = warpgroup_mma(b_q_tail, b_k_tail.permute((1, 0)), b_s, is_async=True)
    return b_s


@gluon.jit
def _weighted(b_packed, b_v, b_v_tail, b_out, b_out_tail, dtype: gl.constexpr, D: gl.constexpr,
              OUT: gl.constexpr, TAIL: gl.constexpr):
    """`out += P V`."""
    b_p = _unpack(b_packed, dtype, gl.DotOperandLayout(0, OUT, 2))
    b_out = warpgroup_mma(b_p, b_v, b_out, is_async=True)
    if D > 64:
        b_p_tail = gl.convert_layout(b_p, gl.DotOperandLayout(0, TAIL, 2))
        b_out_tail = warpgroup_mma(b_p_tail, b_v_tail, b_out_tail, is_async=True)
        b_out, b_out_tail, b_p = warpgroup_mma_wait(0, deps=[b_out, b_out_tail, b_p])
    else:
        b_out, b_p = warpgroup_mma_wait(0, deps=[b_out, b_p])
    return b_out, b_out_tail


@gluon.jit
def _consume(I: gl.constexpr, inputs, out_ptr, qk_scale, D: gl.constexpr, STAGES: gl.constexpr, MODE: gl.constexpr):
    H, tickets, tiles, barriers = inputs
    q_tiles, q_tails, k_tiles, k_tails, v_tiles, v_tails = tiles
    posted, q_full, q_empty, k_full, v_full, empty, turns = barriers
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    TAIL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    b_zero = gl.zeros([UNIT, BLOCK_N], gl.float32, SCORES)
    i_step = 0
    i_pass = 0
    i_turn = 0
    n_steps, n_keys, i_row, n_rows, i_head = _read(tickets, posted, 0)
    while n_steps > 0:
        i_q = i_pass & 1
        mbarrier.wait(q_full.index(i_q), (i_pass >> 1) & 1)
        if I * UNIT < n_rows:
            b_q = q_tiles.index(i_q * CONSUMERS + I)
            b_q_tail = q_tails.index(i_q * CONSUMERS + I)
            i = i_step % STAGES
            phase = (i_step // STAGES) & 1
            mbarrier.wait(k_full.index(i), phase)
            b_s = _scores(b_q, b_q_tail, k_tiles.index(i), k_tails.index(i), b_zero, D)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            mbarrier.arrive(empty.index(i), count=1)
            o_key = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
            b_s = gl.where((o_key < n_keys)[None, :], b_s, float("-inf"))
            b_max = gl.max(b_s, 1)
            b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
            b_sum = gl.sum(b_p, 1)
            b_packed = _pack(b_p, dtype)
            b_out = gl.zeros([UNIT, 64], gl.float32, OUT)
            b_out_tail = gl.zeros([UNIT, 16], gl.float32, TAIL)
            for i_next in range(i_step + 1, i_step + n_steps):
                mbarrier.wait(v_full.index(i), phase)
                i_v = i
                i = i_next % STAGES
                phase = (i_next // STAGES) & 1
                mbarrier.wait(k_full.index(i), phase)
                if MODE == 2:
                    mbarrier.wait(turns.index(I), (i_turn & 1) ^ (1 if I == 0 else 0))
                b_out, b_out_tail = _weighted(
                    b_packed, v_tiles.index(i_v), v_tails.index(i_v), b_out, b_out_tail, dtype, D, OUT, TAIL)
                b_s = _scores(b_q, b_q_tail, k_tiles.index(i), k_tails.index(i), b_zero, D)
                if MODE == 2:
                    mbarrier.arrive(turns.index((I + 1) % CONSUMERS), count=1)
                    i_turn += 1
                b_s = warpgroup_mma_wait(0, deps=[b_s])
                mbarrier.arrive(empty.index(i), count=1)
                b_top = gl.maximum(b_max, gl.max(b_s, 1))
                b_alpha = _exp2((b_max - b_top) * qk_scale)
                b_max = b_top
                b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
                b_sum = b_sum * b_alpha + gl.sum(b_p, 1)
                b_packed = _pack(b_p, dtype)
                b_out *= gl.convert_layout(b_alpha, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None]
                if D > 64:
                    b_out_tail *= gl.convert_layout(b_alpha, gl.SliceLayout(1, TAIL), assert_trivial=True)[:, None]
            mbarrier.arrive(q_empty.index(i_q), count=1)
            mbarrier.wait(v_full.index(i), phase)
            b_out, b_out_tail = _weighted(
                b_packed, v_tiles.index(i), v_tails.index(i), b_out, b_out_tail, dtype, D, OUT, TAIL)
            b_inverse = 1.0 / b_sum
            p_out = out_ptr + (i_row + I * UNIT).to(gl.int64) * (H * D) + i_head * D
            _store(p_out, n_rows - I * UNIT, H * D, b_out, b_inverse, 64, OUT)
            if D > 64:
                _store(p_out + 64, n_rows - I * UNIT, H * D, b_out_tail, b_inverse, D - 64, TAIL)
        else:  # no unit is left for this consumer: only let the others' stages go on
            mbarrier.arrive(q_empty.index(i_q), count=1)
            for i_next in range(i_step, i_step + n_steps):
                i = i_next % STAGES
                phase = (i_next // STAGES) & 1
                mbarrier.wait(k_full.index(i), phase)
                mbarrier.arrive(empty.index(i), count=1)
                mbarrier.wait(v_full.index(i), phase)
                if MODE == 2:
                    if i_next > i_step:
                        mbarrier.wait(turns.index(I), (i_turn & 1) ^ (1 if I == 0 else 0))
                        mbarrier.arrive(turns.index((I + 1) % CONSUMERS), count=1)
                        i_turn += 1
        i_step += n_steps
        i_pass += 1
        n_steps, n_keys, i_row, n_rows, i_head = _read(tickets, posted, i_pass)


@gluon.jit
def _store(p_out, n_rows, stride, b_out, b_inverse, CHANNELS: gl.constexpr, LAYOUT: gl.constexpr):
    o_row = gl.arange(0, UNIT, layout=gl.SliceLayout(1, LAYOUT))
    o_channel = gl.arange(0, b_out.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    b_inverse = gl.convert_layout(b_inverse, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    mask = (o_row < n_rows)[:, None] & (o_channel < CHANNELS)[None, :]
    b_out = (b_out * b_inverse[:, None]).to(p_out.dtype.element_ty)
    gl.store(p_out + (o_row[:, None] * stride + o_channel[None, :]), b_out, mask=mask)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _tiles(COUNT: gl.constexpr, ROWS: gl.constexpr, dtype: gl.constexpr):
    """Shared memory of tiles, 64 channels and 16 more."""
    head = gl.allocate_shared_memory(dtype, [COUNT, ROWS, 64], gl.NVMMASharedLayout(128, 16, 2))
    tail = gl.allocate_shared_memory(dtype, [COUNT, ROWS, 16], gl.NVMMASharedLayout(32, 16, 2))
    return head, tail


@gluon.jit(do_not_specialize=["cu_seqlens_ptr", "counter_ptr", "n_segments", "S", "H", "tall", "n_tall"])
def _hopper_attention(
    q, q_tail, k, k_tail, v, v_tail,  # descriptors of tensors (S, H, D)
    out_ptr,  # shape (S, H, D), contiguous
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    counter_ptr,
    n_segments,
    S,
    H,
    qk_scale,  # scale * log2(e)
    tall,
    n_tall,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    MODE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.dtype
    q_tiles, q_tails = _tiles(2 * CONSUMERS, UNIT, dtype)
    k_tiles, k_tails = _tiles(STAGES, BLOCK_N, dtype)
    v_tiles, v_tails = _tiles(STAGES, BLOCK_N, dtype)
    tiles = (q_tiles, q_tails, k_tiles, k_tails, v_tiles, v_tails)
    tickets = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    barriers = (_barriers(2, 1), _barriers(2, 1), _barriers(2, CONSUMERS),
                _barriers(STAGES, 1), _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS), _barriers(CONSUMERS, 1))
    descriptors = (q, q_tail, k, k_tail, v, v_tail)
    inputs = (H, tickets, tiles, barriers)
    gl.warp_specialize(
        [
            (_consume, (0, inputs, out_ptr, qk_scale, D, STAGES, MODE)),
            (_consume, (1, inputs, out_ptr, qk_scale, D, STAGES, MODE)),
            (_consume, (2, inputs, out_ptr, qk_scale, D, STAGES, MODE)),
            (_produce, (inputs, descriptors, cu_seqlens_ptr, counter_ptr, n_segments, S, tall, n_tall, D, STAGES)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@dataclass(frozen=True)
class HopperConfig:
    stages: int = 3
    registers: int = 160
    producer: int = 32
    mode: int = 0


THREE = HopperConfig()
FOUR = HopperConfig(stages=4)
TURN = HopperConfig(mode=2)
OVER = HopperConfig(mode=3)

SWIZZLED = {64: gl.NVMMASharedLayout(128, 16, 5), 16: gl.NVMMASharedLayout(32, 16, 5)}


class _Rows(TensorDescriptor):
    """Spares the checks, which take longer than the rest of a descriptor."""

    def __post_init__(self) -> None:
        pass


def descriptor(x: Tensor, rows: int, channels: int) -> TensorDescriptor:
    _, H, D = x.shape
    row, head, _ = x.stride()
    strides = [2**34 - row, row, head, row, 1]
    return _Rows(x, [2**31 - 2**16, 2**31 - 2**16, H, 2**30, D], strides, [1, 1, 1, rows, channels], SWIZZLED[channels])


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(1024)
def heights(n_tokens: int, n_segments: int, n_heads: int, n_programs: int) -> tuple[int, int]:
    """Units of a tall tile, and the number of pairs of segment and head that have tall tiles; others are one shorter.

    Fewest units for the busiest program if all segments were equally long; a hint, of influence on speed alone.
    """
    pairs = n_segments * n_heads
    n_units = -(-n_tokens // (64 * n_segments))
    for most in range(-(-pairs * n_units // n_programs), 4):
        if pairs * -(-n_units // most) <= n_programs:
            return most, pairs
    most = max(4, -(-pairs * n_units // n_programs))
    while True:
        n_passes = -(-most // 3)
        high, low = -(-n_units // 3), -(-n_units // 2)
        n_tall = min(pairs, (most - 2 * n_passes) * n_programs // high)
        if (pairs - n_tall) * low <= n_passes * n_programs - n_tall * high:
            return 3, n_tall
        most += 1


def within_tma(x: Tensor) -> Tensor:
    """`x [S, H, D]`, copied if TMA could not address it: strides and address must be multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(0 < stride < 2**32 and stride % 8 == 0 for stride in x.stride()[:2])
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


_compiled: dict = {}


def hopper_attention(q, k, v, cu_seqlens, scale, out, config=THREE, tiles=None):
    S, H, D = q.shape
    n_segments = len(cu_seqlens) - 1
    q, k, v = within_tma(q), within_tma(k), within_tma(v)
    n_programs = multiprocessors(q.device)
    tall, n_tall = tiles or heights(S, n_segments, H, n_programs)
    counter = cu_seqlens if n_segments == 1 else torch.zeros(1, dtype=torch.int32, device=q.device)
    arguments = (
        descriptor(q, 64, 64), descriptor(q, 64, 16), descriptor(k, 128, 64), descriptor(k, 128, 16),
        descriptor(v, 128, 64), descriptor(v, 128, 16), out, cu_seqlens, counter, n_segments, S, H, scale * LOG2_E,
        tall, n_tall, D, config.stages, config.registers, config.producer, config.mode,
    )  # fmt: skip
    grid = (min((S // 64 + n_segments) * H, n_programs), 1, 1)
    key = (q.device, q.dtype, D, config)
    kernel = _compiled.get(key)
    if kernel is None:
        _compiled[key] = _hopper_attention[grid](*arguments, num_warps=4, maxnreg=128)
    else:
        kernel[grid](*arguments)
