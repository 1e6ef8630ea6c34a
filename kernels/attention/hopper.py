"""Attention within segments of any length on Hopper, in Gluon: the same operation as `varlen_attention`, faster there.

One program runs on each multiprocessor: three consumer warpgroups and a producer warp. A *unit* is 64 queries of one
head. A tile is up to three units, one for each consumer; they share the segment's keys, 128 a step:

    producer    takes the next tile, writes a ticket that says what it is, and copies its Q, then K and V step by step,
                into shared memory by TMA, as far ahead as there is room (`hopper_tiles`)
    consumers   out += P V of the last step;  S = Q Kᵀ of this one;  P = 2^(S - maximum);  out and sum rescaled

A consumer waits for its own products, so it overlaps nothing by itself: the other two keep the tensor cores busy while
it exponentiates. They issue their products in turns, so that none waits behind both others': on an H200 that gained
1 to 6 % from 7000 to 24000 tokens and nothing below, and lost 3 to 5 % at 65536. A step with one, two, three consumers
at work took 1.14, 1.37 and 1.74 µs at head_dim 80; the products of three alone take 1.36 at the rate of cuBLAS's best.

Where it saves all programs a round, tiles run on from one head to the next. Such a tile's steps are the two heads' by
turns, and a consumer passes over those that are not its own.

The last, partial step of the keys goes first, and the loop over the others needs no mask. Sums depend on nothing but
the segment's own rows and their number: the same bits alone, among others, and however tiles are cut and handed out.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from qwenvit.kernels.attention.hopper_launch import Operand, cached_launch, contiguous_copy, layout_key
from qwenvit.kernels.attention.hopper_producer import (
    CONSUMERS,
    STAGES,
    STEP,
    UNIT,
    make_barriers,
    produce,
    read_place,
    read_work,
    saves_a_wave,
    tile_memory,
)
from qwenvit.kernels.attention.varlen import LOG2_E
from qwenvit.kernels.device import capability, multiprocessors

CONSUMER_REGISTERS = gl.constexpr(152)
PRODUCER_REGISTERS = gl.constexpr(56)
MAX_REGISTERS = 128
"""Registers a thread at launch. The producer's warp counts as four: 3 · 152 + 56 = 4 · 128, all there are."""


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _pack(b_p, dtype: gl.constexpr):
    """[rows, N] fp32 -> [rows, N / 2] int32 of pairs: carried round a loop, each 16-bit value would take a register."""
    b_even, b_odd = gl.split(gl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // 2, 2]))
    ROUND: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ROUND, "=r,f,f", [b_even, b_odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(b_pairs, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    SPLIT: gl.constexpr = "mov.b32 {$0, $1}, $2;"
    b_even, b_odd = gl.inline_asm_elementwise(
        SPLIT, "=h,=h,r", [b_pairs], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    b_p = gl.reshape(gl.join(b_even, b_odd), [b_pairs.shape[0], 2 * b_pairs.shape[1]]).to(dtype, bitcast=True)
    return gl.convert_layout(b_p, LAYOUT, assert_trivial=True)


@gluon.jit
def _scores(b_q, b_q_rest, b_k, b_k_rest, b_zero, D: gl.constexpr):
    """Products of a unit's queries and a step's keys, [UNIT, STEP], not scaled; issued, not waited for."""
    b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    if D > 64:
        b_s = warpgroup_mma(b_q_rest, b_k_rest.permute((1, 0)), b_s, is_async=True)
    return b_s


@gluon.jit
def _add_values(b_pairs, b_v, b_v_rest, b_out, b_rest, dtype: gl.constexpr, D: gl.constexpr):
    OUT: gl.constexpr = b_out.type.layout
    REST: gl.constexpr = b_rest.type.layout
    b_p = _unpack(b_pairs, dtype, gl.DotOperandLayout(0, OUT, 2))
    b_out = warpgroup_mma(b_p, b_v, b_out, is_async=True)
    if D > 64:
        b_rest = warpgroup_mma(gl.convert_layout(b_p, gl.DotOperandLayout(0, REST, 2)), b_v_rest, b_rest, is_async=True)
        b_out, b_rest, b_p = warpgroup_mma_wait(0, deps=[b_out, b_rest, b_p])
    else:
        b_out, b_p = warpgroup_mma_wait(0, deps=[b_out, b_p])
    return b_out, b_rest


@gluon.jit
def _store(p_out, stride, n_rows, b_out, b_inverse, CHANNELS: gl.constexpr):
    """Outputs, through shared memory so that each thread writes 16 bytes: 500 cycles a tile; 2 by 2 they took 4000."""
    WIDTH: gl.constexpr = b_out.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    b_inverse = gl.convert_layout(b_inverse, gl.SliceLayout(1, b_out.type.layout), assert_trivial=True)
    b_out = gl.convert_layout((b_out * b_inverse[:, None]).to(p_out.dtype.element_ty), ROWS)
    o_row = gl.arange(0, UNIT, layout=gl.SliceLayout(1, ROWS))
    o_channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, ROWS))
    mask = (o_row < n_rows)[:, None] & (o_channel < CHANNELS)[None, :]
    gl.store(p_out + (o_row[:, None] * stride + o_channel[None, :]), b_out, mask=mask)


@gluon.jit
def _pass_over(i_step, k_full, v_full, empty):
    """Leave a step to the others. A barrier tells odd phases from even ones only: so all are waited for, one by one."""
    mbarrier.wait(k_full.index(i_step % STAGES), (i_step // STAGES) & 1)
    mbarrier.arrive(empty.index(i_step % STAGES), count=1)
    mbarrier.wait(v_full.index(i_step % STAGES), (i_step // STAGES) & 1)


@gluon.jit
def _consume(SELF: gl.constexpr, state, out_ptr, qk_scale, D: gl.constexpr, ACROSS: gl.constexpr):
    tickets, q_tiles, k_tiles, v_tiles, barriers = state
    written, q_full, q_empty, k_full, v_full, empty, turns = barriers
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    b_zero = gl.zeros([UNIT, STEP], gl.float32, SCORES)
    i_step = 0
    i_turn = 0
    i_done = 0
    n_steps, n_first_keys, n_rows, n_here = read_work(tickets, written, 0, SELF, ACROSS)
    while n_steps > 0:
        slot = i_done & 1
        mbarrier.wait(q_full.index(slot), (i_done >> 1) & 1)
        every = 1
        if ACROSS:
            every = 1 + (n_here < CONSUMERS).to(gl.int32)
        past = i_step + every * n_steps
        if n_rows > SELF * UNIT:
            if ACROSS:  # noqa: SIM102 (known when compiling)
                if n_here <= SELF:
                    _pass_over(i_step, k_full, v_full, empty)
                    i_step += 1
            i = i_step % STAGES
            phase = (i_step // STAGES) & 1
            b_q = q_tiles[0].index(slot * CONSUMERS + SELF)
            b_q_rest = q_tiles[1].index(slot * CONSUMERS + SELF)
            mbarrier.wait(k_full.index(i), phase)
            b_s = _scores(b_q, b_q_rest, k_tiles[0].index(i), k_tiles[1].index(i), b_zero, D)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            mbarrier.arrive(empty.index(i), count=1)
            o_key = gl.arange(0, STEP, layout=gl.SliceLayout(0, SCORES))
            b_s = gl.where((o_key < n_first_keys)[None, :], b_s, float("-inf"))
            b_max = gl.max(b_s, 1)
            b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
            b_sum = gl.sum(b_p, 1)
            b_pairs = _pack(b_p, dtype)
            b_out = gl.zeros([UNIT, 64], gl.float32, OUT)
            b_rest = gl.zeros([UNIT, 16], gl.float32, REST)
            for i_next in range(i_step + every, past, every):
                if not ACROSS:
                    i_turn = i_next - 1 - i_done  # no turns in a tile's first step
                mbarrier.wait(v_full.index(i), phase)
                i_value = i
                i = i_next % STAGES
                phase = (i_next // STAGES) & 1
                mbarrier.wait(k_full.index(i), phase)
                mbarrier.wait(turns.index(SELF), (i_turn & 1) ^ (1 if SELF == 0 else 0))
                b_out, b_rest = _add_values(
                    b_pairs, v_tiles[0].index(i_value), v_tiles[1].index(i_value), b_out, b_rest, dtype, D
                )
                b_s = _scores(b_q, b_q_rest, k_tiles[0].index(i), k_tiles[1].index(i), b_zero, D)
                mbarrier.arrive(turns.index((SELF + 1) % CONSUMERS), count=1)
                b_s = warpgroup_mma_wait(0, deps=[b_s])
                if ACROSS:
                    i_turn += 1
                    if every > 1:
                        _pass_over(i_next - 1, k_full, v_full, empty)
                mbarrier.arrive(empty.index(i), count=1)
                b_top = gl.maximum(b_max, gl.max(b_s, 1))
                b_alpha = _exp2((b_max - b_top) * qk_scale)
                b_max = b_top
                b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
                b_sum = b_sum * b_alpha + gl.sum(b_p, 1)
                b_pairs = _pack(b_p, dtype)
                b_out *= gl.convert_layout(b_alpha, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None]
                if D > 64:
                    b_rest *= gl.convert_layout(b_alpha, gl.SliceLayout(1, REST), assert_trivial=True)[:, None]
            n_rows, i_out, stride = read_place(tickets, i_done, SELF, ACROSS)
            stride *= 8
            mbarrier.arrive(q_empty.index(slot), count=1)
            mbarrier.wait(v_full.index(i), phase)
            b_out, b_rest = _add_values(b_pairs, v_tiles[0].index(i), v_tiles[1].index(i), b_out, b_rest, dtype, D)
            if ACROSS:  # noqa: SIM102
                if (every > 1) & (n_here > SELF):
                    _pass_over(past - 1, k_full, v_full, empty)
            b_inverse = 1.0 / b_sum
            p_out = out_ptr + i_out.to(gl.int64) * 8 + SELF * UNIT * stride
            _store(p_out, stride, n_rows - SELF * UNIT, b_out, b_inverse, 64)
            if D > 64:
                _store(p_out + 64, stride, n_rows - SELF * UNIT, b_rest, b_inverse, D - 64)
        else:  # the tile has no unit for this consumer, which only keeps the others going
            mbarrier.arrive(q_empty.index(slot), count=1)
            for i_next in range(i_step, past):
                _pass_over(i_next, k_full, v_full, empty)
                if (i_next > i_step) & (every == 1):  # a tile of two heads that has none for it has a step of each
                    if not ACROSS:
                        i_turn = i_next - 1 - i_done
                    mbarrier.wait(turns.index(SELF), (i_turn & 1) ^ (1 if SELF == 0 else 0))
                    mbarrier.arrive(turns.index((SELF + 1) % CONSUMERS), count=1)
                    if ACROSS:
                        i_turn += 1
        i_step = past
        i_done += 1
        n_steps, n_first_keys, n_rows, n_here = read_work(tickets, written, i_done, SELF, ACROSS)


@gluon.jit(do_not_specialize=["cu_seqlens_ptr", "counter_ptr", "n_segments", "S", "H"])
def _hopper_attention(
    q,  # this and the next five are descriptors of tensors (S, H, 64), and (S, H, 16 or D - 64) for the rest
    q_rest,
    k,
    k_rest,
    v,
    v_rest,
    out_ptr,  # shape (S, H, D), contiguous
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    counter_ptr,  # int32, shape (2,), zero: tiles taken beyond each program's first, and programs that are done
    n_segments,
    S,
    H,
    qk_scale,  # scale * log2(e)
    D: gl.constexpr,
    ACROSS: gl.constexpr,
):
    dtype: gl.constexpr = q.dtype
    state = (
        gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        tile_memory(2 * CONSUMERS, UNIT, dtype),
        tile_memory(STAGES, STEP, dtype),
        tile_memory(STAGES, STEP, dtype),
        make_barriers(),
    )
    q_pair, k_pair, v_pair = (q, q_rest), (k, k_rest), (v, v_rest)
    gl.warp_specialize(
        [
            (_consume, (0, state, out_ptr, qk_scale, D, ACROSS)),
            (_consume, (1, state, out_ptr, qk_scale, D, ACROSS)),
            (_consume, (2, state, out_ptr, qk_scale, D, ACROSS)),
            (produce, (state, q_pair, k_pair, v_pair, cu_seqlens_ptr, counter_ptr, n_segments, S, H, D, ACROSS)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or capability(device) != (9, 0):
        raise ValueError(f"device: expected a GPU of compute capability 9.0, got {device}")
    return multiprocessors(device)


_kernels: dict[tuple, Any] = {}
"""Compiled, by device, dtype, head_dim and whether tiles run on from head to head."""


def hopper_attention(q: Operand, k: Operand, v: Operand, cu_seqlens: Tensor, scale: float, out: Tensor) -> None:
    """Attention within segments of any length, into `out [S, H, D]`, in bfloat16 or float16.

    `out` is contiguous and begins at a multiple of 16 bytes. Queries, keys (both rotated) and values are `[S, H, D]`
    each, or two tensors: `[S, H, 64]`, and the other channels, D - 64 of them, or 16 with zeros at the end. I/O: reads
    all three once, if K and V stay in L2, and writes `out`. A segment of L tokens takes 4 L² H D FLOPs.
    """
    S, H, D = out.shape
    device, dtype = out.device, out.dtype
    n_segments = len(cu_seqlens) - 1
    programs = min((S // 64 + n_segments) * H, _multiprocessors(device))
    across = n_segments == 1 and saves_a_wave(S, H, programs)
    scalars = n_segments, S, H, scale * LOG2_E, D, across
    launch = cached_launch(layout_key(q), layout_key(k), layout_key(v), device, dtype, programs, scalars)
    if launch is None:
        hopper_attention(contiguous_copy(q), contiguous_copy(k), contiguous_copy(v), cu_seqlens, scale, out)
        return
    if launch.kernel is None:
        kernel = _kernels.get((device, dtype, D, across))
        if kernel is None:
            arguments = launch.arguments(out, cu_seqlens)
            kernel = _hopper_attention[programs, 1, 1](*arguments, num_warps=4, maxnreg=MAX_REGISTERS)
            _kernels[device, dtype, D, across] = kernel
            return
        launch.bind(kernel)
    launch(out, cu_seqlens)
