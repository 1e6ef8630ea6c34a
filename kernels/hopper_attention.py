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
from functools import cache

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
PASS_COST = gl.constexpr(1)
"""What starting and ending a unit weighs, in key tiles."""


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
def _add(a, b):
    return a + b


@gluon.jit
def _units_and_tiles(start, end):
    """Units of queries and tiles of keys in a segment."""
    return (end - start + UNIT - 1) // UNIT, (end - start + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def _weigh(cu_seqlens_ptr, n_segments, S, i_first, BLOCK: gl.constexpr):
    """Units of one head in BLOCK segments from `i_first` on, and what they weigh together."""
    o_segment = i_first + gl.arange(0, BLOCK, layout=gl.BlockedLayout([BLOCK // 32], [32], [4], [0]))
    m_segment = o_segment < n_segments
    start = gl.load(cu_seqlens_ptr + o_segment, mask=m_segment, other=0)
    end = gl.minimum(gl.load(cu_seqlens_ptr + o_segment + 1, mask=m_segment, other=0), S)
    n_units, n_tiles = _units_and_tiles(start, end)
    return n_units, n_units.to(gl.int64) * (n_tiles + PASS_COST)


@gluon.jit
def _locate(cu_seqlens_ptr, n_segments, S, H, target, i_segment, n_units, weight):
    """Number of the first unit that has `target` before it, counted in its segment.

    Args: segments that lie before `target` as a whole, and one head's units and weight in them.
    """
    i_here = gl.minimum(i_segment, n_segments - 1)
    start = gl.load(cu_seqlens_ptr + i_here)
    _, n_tiles = _units_and_tiles(start, gl.minimum(gl.load(cu_seqlens_ptr + i_here + 1), S))
    each = n_tiles + PASS_COST
    return ((target - weight * H + each - 1) // each).to(gl.int32)


@gluon.jit
def _share(cu_seqlens_ptr, n_segments, S, H):
    """This program's run of units: the segment and the unit in it where it starts, and how many they are."""
    BLOCK: gl.constexpr = 256
    zero = n_segments.to(gl.int64) * 0
    total = zero
    for i_first in range(0, n_segments, BLOCK):
        _, b_weight = _weigh(cu_seqlens_ptr, n_segments, S, i_first, BLOCK)
        total += gl.sum(b_weight, 0)
    n_programs = gl.num_programs(0)
    first = (total * H * gl.program_id(0) + n_programs - 1) // n_programs
    past = (total * H * (gl.program_id(0) + 1) + n_programs - 1) // n_programs
    before = zero
    i_segment, n_units, weight = 0, 0, zero
    i_segment_past, n_units_past, weight_past = 0, 0, zero
    for i_first in range(0, n_segments, BLOCK):
        b_units, b_weight = _weigh(cu_seqlens_ptr, n_segments, S, i_first, BLOCK)
        b_end = (before + gl.associative_scan(b_weight, 0, _add)) * H
        m_first = b_end <= first
        m_past = b_end <= past
        i_segment += gl.sum(m_first.to(gl.int32), 0)
        i_segment_past += gl.sum(m_past.to(gl.int32), 0)
        n_units += gl.sum(gl.where(m_first, b_units, 0), 0)
        n_units_past += gl.sum(gl.where(m_past, b_units, 0), 0)
        weight += gl.sum(gl.where(m_first, b_weight, 0), 0)
        weight_past += gl.sum(gl.where(m_past, b_weight, 0), 0)
        before += gl.sum(b_weight, 0)
    i_unit = _locate(cu_seqlens_ptr, n_segments, S, H, first, i_segment, n_units, weight)
    i_past = _locate(cu_seqlens_ptr, n_segments, S, H, past, i_segment_past, n_units_past, weight_past)
    return i_segment, i_unit, (n_units_past - n_units) * H + i_past - i_unit


@gluon.jit
def _next(cu_seqlens_ptr, S, H, i_segment, i_unit, n_left, CONSUMERS: gl.constexpr):
    """The next units of one head that the consumers take together, evenly many each time."""
    start = gl.load(cu_seqlens_ptr + i_segment)
    end = gl.minimum(gl.load(cu_seqlens_ptr + i_segment + 1), S)
    n_units, n_tiles = _units_and_tiles(start, end)
    while i_unit == n_units * H:  # the segment is done, or empty
        i_segment += 1
        i_unit = 0
        start = end
        end = gl.minimum(gl.load(cu_seqlens_ptr + i_segment + 1), S)
        n_units, n_tiles = _units_and_tiles(start, end)
    i_head = i_unit // n_units
    i_row = i_unit - i_head * n_units
    n_here = gl.minimum(n_units - i_row, n_left)
    n_passes = (n_here + CONSUMERS - 1) // CONSUMERS
    n_active = (n_here + n_passes - 1) // n_passes
    return i_segment, i_unit, start, end, n_tiles, i_head, i_row * UNIT, n_active


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
def _produce(inputs, descriptors, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    share, cu_seqlens_ptr, S, H, tiles, barriers = inputs
    q, q_tail, k, k_tail, v, v_tail = descriptors
    q_tiles, q_tails, k_tiles, k_tails, v_tiles, v_tails = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    ROW: gl.constexpr = 128 if D == 64 else 160
    i_segment, i_unit, n_left = share
    i_step = 0
    i_pass = 0
    i_turn = 0
    while n_left > 0:
        i_segment, i_unit, start, end, n_tiles, i_head, i_row, n_active = _next(
            cu_seqlens_ptr, S, H, i_segment, i_unit, n_left, CONSUMERS)
        for i_tile in range(n_tiles):
            i = i_step % STAGES
            phase = ((i_step // STAGES) & 1) ^ 1
            i_key = (n_tiles - 1 - i_tile) * BLOCK_N
            mbarrier.wait(k_empty.index(i), phase)
            mbarrier.expect(k_full.index(i), BLOCK_N * ROW)
            _copy((k, k_tail), (k_tiles.index(i), k_tails.index(i)), k_full.index(i), i_key, end, end - start, i_head, D, BLOCK_N)
            if i_tile == 0:  # after the first keys, which need not wait for the last pass to end
                mbarrier.wait(q_empty, (i_pass & 1) ^ 1)
                mbarrier.expect(q_full, CONSUMERS * UNIT * ROW)
                for i_consumer in gl.static_range(CONSUMERS):
                    _copy((q, q_tail), (q_tiles.index(i_consumer), q_tails.index(i_consumer)), q_full,
                          i_row + i_consumer * UNIT, end, end - start, i_head, D, UNIT)
            mbarrier.wait(v_empty.index(i), phase)
            mbarrier.expect(v_full.index(i), BLOCK_N * ROW)
            _copy((v, v_tail), (v_tiles.index(i), v_tails.index(i)), v_full.index(i), i_key, end, end - start, i_head, D, BLOCK_N)
            i_step += 1
        i_pass += 1
        i_unit += n_active
        n_left -= n_active


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
def _consume(I: gl.constexpr, inputs, out_ptr, qk_scale, D: gl.constexpr, STAGES: gl.constexpr,
             CONSUMERS: gl.constexpr, MODE: gl.constexpr):
    share, cu_seqlens_ptr, S, H, tiles, barriers = inputs
    q_tiles, q_tails, k_tiles, k_tails, v_tiles, v_tails = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    TAIL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    b_q = q_tiles.index(I)
    b_q_tail = q_tails.index(I)
    b_zero = gl.zeros([UNIT, BLOCK_N], gl.float32, SCORES)
    i_segment, i_unit, n_left = share
    i_step = 0
    i_pass = 0
    i_turn = 0
    while n_left > 0:
        i_segment, i_unit, start, end, n_tiles, i_head, i_row, n_active = _next(
            cu_seqlens_ptr, S, H, i_segment, i_unit, n_left, CONSUMERS)
        mbarrier.wait(q_full, i_pass & 1)
        if I < n_active:
            i = i_step % STAGES
            phase = (i_step // STAGES) & 1
            mbarrier.wait(k_full.index(i), phase)
            b_s = _scores(b_q, b_q_tail, k_tiles.index(i), k_tails.index(i), b_zero, D)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            mbarrier.arrive(k_empty.index(i), count=1)
            o_key = (n_tiles - 1) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
            b_s = gl.where((o_key < end - start)[None, :], b_s, float("-inf"))
            b_max = gl.max(b_s, 1)
            b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
            b_sum = gl.sum(b_p, 1)
            b_packed = _pack(b_p, dtype)
            b_out = gl.zeros([UNIT, 64], gl.float32, OUT)
            b_out_tail = gl.zeros([UNIT, 16], gl.float32, TAIL)
            for i_next in range(i_step + 1, i_step + n_tiles):
                mbarrier.wait(v_full.index(i), phase)
                if MODE == 2:
                    mbarrier.wait(turns.index(I), (i_turn & 1) ^ (1 if I == 0 else 0))
                b_out, b_out_tail = _weighted(
                    b_packed, v_tiles.index(i), v_tails.index(i), b_out, b_out_tail, dtype, D, OUT, TAIL)
                mbarrier.arrive(v_empty.index(i), count=1)
                i = i_next % STAGES
                phase = (i_next // STAGES) & 1
                mbarrier.wait(k_full.index(i), phase)
                b_s = _scores(b_q, b_q_tail, k_tiles.index(i), k_tails.index(i), b_zero, D)
                if MODE == 2:
                    mbarrier.arrive(turns.index((I + 1) % CONSUMERS), count=1)
                    i_turn += 1
                b_s = warpgroup_mma_wait(0, deps=[b_s])
                mbarrier.arrive(k_empty.index(i), count=1)
                b_top = gl.maximum(b_max, gl.max(b_s, 1))
                b_alpha = _exp2((b_max - b_top) * qk_scale)
                b_max = b_top
                b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
                b_sum = b_sum * b_alpha + gl.sum(b_p, 1)
                b_packed = _pack(b_p, dtype)
                b_out *= gl.convert_layout(b_alpha, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None]
                if D > 64:
                    b_out_tail *= gl.convert_layout(b_alpha, gl.SliceLayout(1, TAIL), assert_trivial=True)[:, None]
            mbarrier.arrive(q_empty, count=1)
            mbarrier.wait(v_full.index(i), phase)
            b_out, b_out_tail = _weighted(
                b_packed, v_tiles.index(i), v_tails.index(i), b_out, b_out_tail, dtype, D, OUT, TAIL)
            mbarrier.arrive(v_empty.index(i), count=1)
            b_inverse = 1.0 / b_sum
            o_row = i_row + I * UNIT
            p_out = out_ptr + (start + o_row).to(gl.int64) * (H * D) + i_head * D
            _store(p_out, end - start - o_row, H * D, b_out, b_inverse, 64, OUT)
            if D > 64:
                _store(p_out + 64, end - start - o_row, H * D, b_out_tail, b_inverse, D - 64, TAIL)
        else:  # no unit is left for this consumer: only let the others' stages go on
            mbarrier.arrive(q_empty, count=1)
            for i_next in range(i_step, i_step + n_tiles):
                i = i_next % STAGES
                phase = (i_next // STAGES) & 1
                mbarrier.wait(k_full.index(i), phase)
                mbarrier.arrive(k_empty.index(i), count=1)
                mbarrier.wait(v_full.index(i), phase)
                mbarrier.arrive(v_empty.index(i), count=1)
                if MODE == 2:
                    if i_next > i_step:
                        mbarrier.wait(turns.index(I), (i_turn & 1) ^ (1 if I == 0 else 0))
                        mbarrier.arrive(turns.index((I + 1) % CONSUMERS), count=1)
                        i_turn += 1
        i_step += n_tiles
        i_pass += 1
        i_unit += n_active
        n_left -= n_active


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


@gluon.jit(do_not_specialize=["n_segments", "S", "H"])
def _hopper_attention(
    q, q_tail, k, k_tail, v, v_tail,  # descriptors of tensors (S, H, D)
    out_ptr,  # shape (S, H, D), contiguous
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    n_segments,
    S,
    H,
    qk_scale,  # scale * log2(e)
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    MODE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.dtype
    q_tiles, q_tails = _tiles(CONSUMERS, UNIT, dtype)
    k_tiles, k_tails = _tiles(STAGES, BLOCK_N, dtype)
    v_tiles, v_tails = _tiles(STAGES, BLOCK_N, dtype)
    tiles = (q_tiles, q_tails, k_tiles, k_tails, v_tiles, v_tails)
    q_full = _barriers(1, 1).index(0)
    q_empty = _barriers(1, CONSUMERS).index(0)
    barriers = (q_full, q_empty, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS), _barriers(STAGES, 1),
                _barriers(STAGES, CONSUMERS), _barriers(CONSUMERS, 1))
    share = _share(cu_seqlens_ptr, n_segments, S, H)
    descriptors = (q, q_tail, k, k_tail, v, v_tail)
    inputs = (share, cu_seqlens_ptr, S, H, tiles, barriers)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, inputs, out_ptr, qk_scale, D, STAGES, CONSUMERS, MODE)),
                (_consume, (1, inputs, out_ptr, qk_scale, D, STAGES, CONSUMERS, MODE)),
                (_produce, (inputs, descriptors, D, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, inputs, out_ptr, qk_scale, D, STAGES, CONSUMERS, MODE)),
                (_consume, (1, inputs, out_ptr, qk_scale, D, STAGES, CONSUMERS, MODE)),
                (_consume, (2, inputs, out_ptr, qk_scale, D, STAGES, CONSUMERS, MODE)),
                (_produce, (inputs, descriptors, D, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24],
        )


@dataclass(frozen=True)
class HopperConfig:
    consumers: int
    stages: int
    registers: int
    maxnreg: int
    mode: int = 0


THREE = HopperConfig(consumers=3, stages=3, registers=160, maxnreg=128)
TWO = HopperConfig(consumers=2, stages=3, registers=240, maxnreg=168)
FOUR = HopperConfig(consumers=3, stages=4, registers=160, maxnreg=128)
CHAIN = HopperConfig(consumers=3, stages=4, registers=160, maxnreg=128, mode=2)

SWIZZLED = {64: gl.NVMMASharedLayout(128, 16, 5), 16: gl.NVMMASharedLayout(32, 16, 5)}


def descriptor(x: Tensor, rows: int, channels: int) -> TensorDescriptor:
    S, H, D = x.shape
    row, head = x.stride(0), x.stride(1)
    return TensorDescriptor(
        x, [2**31 - 2**16, 2**31 - 2**16, H, 2**30, D], [2**34 - row, row, head, row, 1],
        [1, 1, 1, rows, channels], SWIZZLED[channels])


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def within_tma(x: Tensor) -> Tensor:
    """`x [S, H, D]`, copied if TMA could not address it: strides and address must be multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(0 < stride < 2**32 and stride % 8 == 0 for stride in x.stride()[:2])
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def hopper_attention(q, k, v, cu_seqlens, scale, out, config=THREE):
    S, H, D = q.shape
    n_segments = len(cu_seqlens) - 1
    q, k, v = within_tma(q), within_tma(k), within_tma(v)
    pairs = [descriptor(x, rows, c) for x, rows in ((q, 64), (k, 128), (v, 128)) for c in (64, 16)]
    n_units = (S // 64 + n_segments) * H
    grid = (min(n_units, multiprocessors(q.device)),)
    _hopper_attention[grid](
        *pairs, out, cu_seqlens, n_segments, S, H, scale * LOG2_E,
        D=D, STAGES=config.stages, CONSUMERS=config.consumers, CONSUMER_REGISTERS=config.registers, MODE=config.mode,
        num_warps=4, maxnreg=config.maxnreg)
