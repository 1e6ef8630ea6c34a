"""Attention within segments of any length on Hopper, in Gluon: the operation of `varlen_attention`, faster on sm_90.

The kernel is persistent, one program per multiprocessor, with producer/consumer warp specialization: a producer warp
and three consumer warpgroups. A *unit* is 64 queries of one head. A *tile* is up to three units, one for each consumer,
which share the segment's keys, 128 a step. Tiles are scheduled dynamically. For each tile:

1. The producer takes the tile's number from a counter in global memory, waits for `q_empty`, starts TMA copies of Q
   that complete `q_full`, writes the tile's work descriptor, its *ticket*, and arrives at `ticket_full`.
2. For each step the producer starts copies of K and V that complete `k_full` and `v_full`. It waits for `kv_empty`
   before it overwrites a stage, so it runs up to STAGES steps ahead.
3. For each step a consumer waits for `v_full` of the step before, `k_full` of this step, and `issue_order`. It issues
   out += P V of the step before and S = Q Kᵀ of this step, arrives at the next consumer's `issue_order`, and waits for
   the products. It arrives at `kv_empty`, which frees this step's K and the V of the step before, computes
   P = 2^(S - maximum), and rescales the output and the sum.
4. After the last step a consumer reads from the ticket where its rows go, arrives at `q_empty`, which frees Q and the
   ticket, adds the last P V, and stores the output.

There are two buffers for Q and tickets, and STAGES for K and V.

A consumer waits for its own products, so by itself it overlaps nothing: the other two keep the tensor cores busy while
it exponentiates. The issue order keeps a consumer from waiting behind the products of both others.

Where it saves a wave, tiles continue across heads (ACROSS_HEADS). The steps of such a tile alternate between its two
heads, and a consumer skips the steps of the other head.

The last, partial step of the keys comes first, so the loop over the others needs no mask. The order of a segment's sums
depends on its own length alone: its output has the same bits alone, in any batch, and for any tiles. TUNING.md has the
measurements.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from qwenvit.kernels.attention.hopper_launch import Operand, cached_launch, contiguous_copy, operand_key
from qwenvit.kernels.attention.hopper_producer import (
    STAGES,
    STEP_KEYS,
    allocate_tiles,
    make_barriers,
    produce,
    read_output_location,
    wait_for_ticket,
)
from qwenvit.kernels.attention.hopper_scheduler import CONSUMERS, UNIT_QUERIES, saves_a_wave
from qwenvit.kernels.attention.varlen import LOG2_E
from qwenvit.kernels.device import capability, multiprocessors

CONSUMER_REGISTERS = gl.constexpr(152)
PRODUCER_REGISTERS = gl.constexpr(56)
MAX_REGISTERS = 128
"""Registers per thread at launch. Registers are allotted to four warpgroups (the producer's warp counts as one), and
3 · 152 + 56 = 4 · 128 uses all of a multiprocessor's."""


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _pack(b_p, dtype: gl.constexpr):
    """Round [rows, N] fp32 to 16 bits and return pairs as [rows, N / 2] int32.

    A loop carries the pairs: it would keep each 16-bit value in a register of its own.
    """
    b_even, b_odd = gl.split(gl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // 2, 2]))
    ROUND: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ROUND, "=r,f,f", [b_even, b_odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(b_pairs, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """Return `_pack`'s [rows, N / 2] pairs as [rows, N] of `dtype`."""
    SPLIT: gl.constexpr = "mov.b32 {$0, $1}, $2;"
    b_even, b_odd = gl.inline_asm_elementwise(
        SPLIT, "=h,=h,r", [b_pairs], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    b_p = gl.reshape(gl.join(b_even, b_odd), [b_pairs.shape[0], 2 * b_pairs.shape[1]]).to(dtype, bitcast=True)
    return gl.convert_layout(b_p, LAYOUT, assert_trivial=True)


@gluon.jit
def _scores(b_q, b_q_rest, b_k, b_k_rest, b_zero, D: gl.constexpr):
    """Issue the products of a unit's queries and a step's keys, and return [UNIT_QUERIES, STEP_KEYS], not scaled."""
    b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    if D > 64:
        b_s = warpgroup_mma(b_q_rest, b_k_rest.permute((1, 0)), b_s, is_async=True)
    return b_s


@gluon.jit
def _add_values(b_pairs, b_v, b_v_rest, b_out, b_rest, dtype: gl.constexpr, D: gl.constexpr):
    """Return b_out [UNIT_QUERIES, 64] and b_rest [UNIT_QUERIES, 16] plus P V, after the products are complete."""
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
    """Normalise and store rows of the output, through shared memory so that each thread writes 16 bytes (TUNING.md)."""
    WIDTH: gl.constexpr = b_out.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    b_inverse = gl.convert_layout(b_inverse, gl.SliceLayout(1, b_out.type.layout), assert_trivial=True)
    b_out = gl.convert_layout((b_out * b_inverse[:, None]).to(p_out.dtype.element_ty), ROWS)
    o_row = gl.arange(0, UNIT_QUERIES, layout=gl.SliceLayout(1, ROWS))
    o_channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, ROWS))
    mask = (o_row < n_rows)[:, None] & (o_channel < CHANNELS)[None, :]
    gl.store(p_out + (o_row[:, None] * stride + o_channel[None, :]), b_out, mask=mask)


@gluon.jit
def _skip_step(i_step, k_full, v_full, kv_empty):
    """Free a step that belongs to the other consumers.

    A barrier tells only odd phases from even ones, so a consumer waits for every phase, even of steps it does not use.
    """
    mbarrier.wait(k_full.index(i_step % STAGES), (i_step // STAGES) & 1)
    mbarrier.arrive(kv_empty.index(i_step % STAGES), count=1)
    mbarrier.wait(v_full.index(i_step % STAGES), (i_step // STAGES) & 1)


@gluon.jit
def _consume(I_CONSUMER: gl.constexpr, shared, out_ptr, qk_scale, D: gl.constexpr, ACROSS_HEADS: gl.constexpr):
    """Run consumer I_CONSUMER: compute and store its unit of each tile, until a ticket has no steps."""
    tickets, q_tiles, k_tiles, v_tiles, barriers = shared
    ticket_full, q_full, q_empty, k_full, v_full, kv_empty, issue_order = barriers
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP_KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    b_zero = gl.zeros([UNIT_QUERIES, STEP_KEYS], gl.float32, SCORES)
    i_step = 0
    i_issue = 0
    i_ticket = 0
    n_steps, n_first_keys, n_rows, n_first_head_units = wait_for_ticket(
        tickets, ticket_full, 0, I_CONSUMER, ACROSS_HEADS
    )
    while n_steps > 0:
        i_slot = i_ticket & 1
        mbarrier.wait(q_full.index(i_slot), (i_ticket >> 1) & 1)
        step_stride = 1
        if ACROSS_HEADS:
            step_stride = 1 + (n_first_head_units < CONSUMERS).to(gl.int32)
        step_end = i_step + step_stride * n_steps
        if n_rows > I_CONSUMER * UNIT_QUERIES:
            if ACROSS_HEADS:  # noqa: SIM102 (known when compiling)
                if n_first_head_units <= I_CONSUMER:
                    _skip_step(i_step, k_full, v_full, kv_empty)
                    i_step += 1
            i_stage = i_step % STAGES
            phase = (i_step // STAGES) & 1
            b_q = q_tiles[0].index(i_slot * CONSUMERS + I_CONSUMER)
            b_q_rest = q_tiles[1].index(i_slot * CONSUMERS + I_CONSUMER)
            mbarrier.wait(k_full.index(i_stage), phase)
            b_s = _scores(b_q, b_q_rest, k_tiles[0].index(i_stage), k_tiles[1].index(i_stage), b_zero, D)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            mbarrier.arrive(kv_empty.index(i_stage), count=1)
            o_key = gl.arange(0, STEP_KEYS, layout=gl.SliceLayout(0, SCORES))
            b_s = gl.where((o_key < n_first_keys)[None, :], b_s, float("-inf"))
            b_max = gl.max(b_s, 1)
            b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
            b_sum = gl.sum(b_p, 1)
            b_pairs = _pack(b_p, dtype)
            b_out = gl.zeros([UNIT_QUERIES, 64], gl.float32, OUT)
            b_rest = gl.zeros([UNIT_QUERIES, 16], gl.float32, REST)
            for i_next_step in range(i_step + step_stride, step_end, step_stride):
                if not ACROSS_HEADS:
                    i_issue = i_next_step - 1 - i_ticket  # a tile's first step is not ordered
                mbarrier.wait(v_full.index(i_stage), phase)
                i_last_stage = i_stage
                i_stage = i_next_step % STAGES
                phase = (i_next_step // STAGES) & 1
                mbarrier.wait(k_full.index(i_stage), phase)
                mbarrier.wait(issue_order.index(I_CONSUMER), (i_issue & 1) ^ (1 if I_CONSUMER == 0 else 0))
                b_out, b_rest = _add_values(
                    b_pairs, v_tiles[0].index(i_last_stage), v_tiles[1].index(i_last_stage), b_out, b_rest, dtype, D
                )
                b_s = _scores(b_q, b_q_rest, k_tiles[0].index(i_stage), k_tiles[1].index(i_stage), b_zero, D)
                mbarrier.arrive(issue_order.index((I_CONSUMER + 1) % CONSUMERS), count=1)
                b_s = warpgroup_mma_wait(0, deps=[b_s])
                if ACROSS_HEADS:
                    i_issue += 1
                    if step_stride > 1:
                        _skip_step(i_next_step - 1, k_full, v_full, kv_empty)
                mbarrier.arrive(kv_empty.index(i_stage), count=1)
                b_new_max = gl.maximum(b_max, gl.max(b_s, 1))
                b_alpha = _exp2((b_max - b_new_max) * qk_scale)
                b_max = b_new_max
                b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
                b_sum = b_sum * b_alpha + gl.sum(b_p, 1)
                b_pairs = _pack(b_p, dtype)
                b_out *= gl.convert_layout(b_alpha, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None]
                if D > 64:
                    b_rest *= gl.convert_layout(b_alpha, gl.SliceLayout(1, REST), assert_trivial=True)[:, None]
            n_rows, i_out, stride = read_output_location(tickets, i_ticket, I_CONSUMER, ACROSS_HEADS)
            stride *= 8
            mbarrier.arrive(q_empty.index(i_slot), count=1)
            mbarrier.wait(v_full.index(i_stage), phase)
            b_out, b_rest = _add_values(
                b_pairs, v_tiles[0].index(i_stage), v_tiles[1].index(i_stage), b_out, b_rest, dtype, D
            )
            if ACROSS_HEADS:  # noqa: SIM102
                if (step_stride > 1) & (n_first_head_units > I_CONSUMER):
                    _skip_step(step_end - 1, k_full, v_full, kv_empty)
            b_inverse = 1.0 / b_sum
            p_out = out_ptr + i_out.to(gl.int64) * 8 + I_CONSUMER * UNIT_QUERIES * stride
            _store(p_out, stride, n_rows - I_CONSUMER * UNIT_QUERIES, b_out, b_inverse, 64)
            if D > 64:
                _store(p_out + 64, stride, n_rows - I_CONSUMER * UNIT_QUERIES, b_rest, b_inverse, D - 64)
        else:  # the tile has no unit for this consumer, which only arrives where the others wait for it
            mbarrier.arrive(q_empty.index(i_slot), count=1)
            for i_next_step in range(i_step, step_end):
                _skip_step(i_next_step, k_full, v_full, kv_empty)
                # First steps have no order. A tile of two heads that lacks this unit has only the first step of each.
                if (i_next_step > i_step) & (step_stride == 1):
                    if not ACROSS_HEADS:
                        i_issue = i_next_step - 1 - i_ticket
                    mbarrier.wait(issue_order.index(I_CONSUMER), (i_issue & 1) ^ (1 if I_CONSUMER == 0 else 0))
                    mbarrier.arrive(issue_order.index((I_CONSUMER + 1) % CONSUMERS), count=1)
                    if ACROSS_HEADS:
                        i_issue += 1
        i_step = step_end
        i_ticket += 1
        n_steps, n_first_keys, n_rows, n_first_head_units = wait_for_ticket(
            tickets, ticket_full, i_ticket, I_CONSUMER, ACROSS_HEADS
        )


@gluon.jit(do_not_specialize=["cu_seqlens_ptr", "counters_ptr", "n_segments", "S", "H"])
def _hopper_attention(
    q,  # descriptor of a tensor of shape (S, H, 64), rotated
    q_rest,  # descriptor, shape (S, H, 16 or D - 64): the channels beyond 64
    k,  # descriptor, shape (S, H, 64), rotated
    k_rest,  # descriptor, shape (S, H, 16 or D - 64)
    v,  # descriptor, shape (S, H, 64)
    v_rest,  # descriptor, shape (S, H, 16 or D - 64)
    out_ptr,  # shape (S, H, D), contiguous
    cu_seqlens_ptr,  # int32, shape (n_segments + 1,)
    counters_ptr,  # int32, shape (2,), zero: tiles taken beyond each program's first, and finished programs
    n_segments,
    S,
    H,
    qk_scale,  # scale * log2(e)
    D: gl.constexpr,
    ACROSS_HEADS: gl.constexpr,
):
    dtype: gl.constexpr = q.dtype
    shared = (
        gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        allocate_tiles(2 * CONSUMERS, UNIT_QUERIES, dtype),
        allocate_tiles(STAGES, STEP_KEYS, dtype),
        allocate_tiles(STAGES, STEP_KEYS, dtype),
        make_barriers(),
    )
    q_pair, k_pair, v_pair = (q, q_rest), (k, k_rest), (v, v_rest)
    gl.warp_specialize(
        [
            (_consume, (0, shared, out_ptr, qk_scale, D, ACROSS_HEADS)),
            (_consume, (1, shared, out_ptr, qk_scale, D, ACROSS_HEADS)),
            (_consume, (2, shared, out_ptr, qk_scale, D, ACROSS_HEADS)),
            (
                produce,
                (shared, q_pair, k_pair, v_pair, cu_seqlens_ptr, counters_ptr, n_segments, S, H, D, ACROSS_HEADS),
            ),
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
"""Compiled kernels by device, dtype, head_dim and ACROSS_HEADS."""


def hopper_attention(q: Operand, k: Operand, v: Operand, cu_seqlens: Tensor, scale: float, out: Tensor) -> None:
    """Write attention within segments of any length into `out [S, H, D]`, in bfloat16 or float16.

    `out` is contiguous and starts at a multiple of 16 bytes. Queries, keys (both rotated) and values are `[S, H, D]`
    each, or two tensors: `[S, H, 64]`, and the other D - 64 channels, which may be padded with zeros to 16. I/O: reads
    all three once, if K and V stay in L2, and writes `out`. A segment of L tokens takes 4 L² H D FLOPs. Raises
    ValueError unless `out` is on a GPU of compute capability 9.0.
    """
    S, H, D = out.shape
    device, dtype = out.device, out.dtype
    n_segments = len(cu_seqlens) - 1
    programs = min((S // 64 + n_segments) * H, _multiprocessors(device))
    across_heads = n_segments == 1 and saves_a_wave(S, H, programs)
    scalars = n_segments, S, H, scale * LOG2_E, D, across_heads
    launch = cached_launch(operand_key(q), operand_key(k), operand_key(v), device, dtype, programs, scalars)
    if launch is None:
        hopper_attention(contiguous_copy(q), contiguous_copy(k), contiguous_copy(v), cu_seqlens, scale, out)
        return
    if launch.kernel is None:
        kernel = _kernels.get((device, dtype, D, across_heads))
        if kernel is None:
            arguments = launch.arguments(out, cu_seqlens)
            kernel = _hopper_attention[programs, 1, 1](*arguments, num_warps=4, maxnreg=MAX_REGISTERS)
            _kernels[device, dtype, D, across_heads] = kernel
            return
        launch.set_kernel(kernel)
    launch(out, cu_seqlens)
