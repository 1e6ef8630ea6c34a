"""A consumer of attention on Hopper: the products and the softmax of its units. `hopper.py` has the schedule.

A consumer waits for its own products, so by itself it overlaps little: the other two keep the tensor cores busy while
it exponentiates. Turns keep a consumer from waiting behind the products of both others. At head_dim 64 S = Q Kᵀ is
issued first, and P V may still run when the softmax starts; ptxas of triton 3.6 waits for it after a quarter of the
comparisons, newer ones earlier (TUNING.md). At 72 and 80 there are too few registers for S beside the P that P V reads,
so P V is complete before Q Kᵀ starts.

What a step takes is mostly instructions of the softmax, so it has as few as possible (TUNING.md):

- The maximum in use is replaced, and the output rescaled, only where 2^scores exceed 2^maximum by more than
  2^MAX_GROWTH; P may be as large as that. Warps without such a row, most of them after the first steps, skip the
  multiplications.
- At head_dim 72 the tensor cores add up the rows of P: V has 80 channels there, and one that would be zero is one.
- At 64 and 80 each thread adds up what it holds of a row, and the four sums of a row meet once a tile.
- Barriers between partitions are named barriers of the hardware where no copy has to arrive. Before a wait for copies
  Triton adds a barrier of the partition, one a step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from qwenvit.kernels.attention.hopper_producer import (
    KV_EMPTY,
    KV_EMPTY_THREADS,
    STAGES,
    STEP_KEYS,
    barrier_arrive,
    barrier_sync,
    read_output_location,
    wait_for_ticket,
)
from qwenvit.kernels.attention.hopper_scheduler import CONSUMERS, UNIT_QUERIES

FIRST_TURN = gl.constexpr(12)
"""The first of CONSUMERS named barriers, at which each consumer waits for its turn."""
MAX_GROWTH = gl.constexpr(0.5)
"""How far scores may exceed the maximum in use, in powers of two, before it is replaced."""
_EXP2_UNLESS_ZEROS = gl.constexpr(
    "{ .reg .pred p, q; setp.neu.f32 p, $2, 0f00000000; setp.neu.or.f32 p, $3, 0f00000000, p; "
    "vote.sync.any.pred q, p, 0xffffffff; mov.f32 $0, 0f3F800000; mov.f32 $1, 0f3F800000; @!q bra.uni DONE; "
    "ex2.approx.ftz.f32 $0, $2; ex2.approx.ftz.f32 $1, $3; DONE: }"
)
_MULTIPLICATIONS = " ".join(f"mul.f32 ${i}, ${i}, ${64 + i};" for i in range(32))
_RESCALE = gl.constexpr(  # $64 and $66 are the factors of a thread's two rows
    "{ .reg .pred p, q; setp.neu.f32 p, $64, 0f3F800000; setp.neu.or.f32 p, $66, 0f3F800000, p; "
    f"vote.sync.any.pred q, p, 0xffffffff; @!q bra.uni DONE; {_MULTIPLICATIONS} DONE: }}"
)
_RESCALE_OPERANDS = gl.constexpr(",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32))


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
    """Issue b_out [UNIT_QUERIES, 64] and b_rest [UNIT_QUERIES, 16] plus P V; return them and P, all in use."""
    OUT: gl.constexpr = b_out.type.layout
    REST: gl.constexpr = b_rest.type.layout
    b_p = _unpack(b_pairs, dtype, gl.DotOperandLayout(0, OUT, 2))
    b_out = warpgroup_mma(b_p, b_v, b_out, is_async=True)
    if D > 64:
        b_rest = warpgroup_mma(gl.convert_layout(b_p, gl.DotOperandLayout(0, REST, 2)), b_v_rest, b_rest, is_async=True)
    return b_out, b_rest, b_p


@gluon.jit
def _thread_sums(b_p):
    """Return [rows, 4]: the sums of each row over the columns that a thread holds."""
    return gl.sum(gl.sum(gl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _exp2_unless_zeros(b_x):
    """Return 2^b_x [rows], computed in warps that have an exponent other than 0."""
    return gl.inline_asm_elementwise(_EXP2_UNLESS_ZEROS, "=&f,=&f,f,f", [b_x], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def _rescale(b_out, b_alpha):
    """Return b_out [rows, 64] times b_alpha [rows], computed in warps that have a factor other than 1."""
    b_alpha, _ = gl.broadcast(b_alpha[:, None], b_out)
    return gl.inline_asm_elementwise(
        _RESCALE, _RESCALE_OPERANDS, [b_out, b_alpha], dtype=gl.float32, is_pure=True, pack=32
    )


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
def _wait_for_turn(I_CONSUMER: gl.constexpr):
    barrier_sync(FIRST_TURN + I_CONSUMER, 2 * 128, 4)


@gluon.jit
def _pass_turn(I_CONSUMER: gl.constexpr):
    barrier_arrive(FIRST_TURN + (I_CONSUMER + 1) % CONSUMERS, 2 * 128, 4)


@gluon.jit
def _wait_for_pair(kv_full, i_pair):
    """Wait for a pair's copies, and return its stage."""
    i_stage = i_pair % STAGES
    mbarrier.wait(kv_full.index(i_stage), (i_pair // STAGES) & 1)
    return i_stage


@gluon.jit
def _free_stage(i_stage):
    barrier_arrive(KV_EMPTY + i_stage, KV_EMPTY_THREADS, 4)


@gluon.jit
def _skip_pair(kv_full, i_pair):
    """Free a pair that belongs to the other consumers.

    An mbarrier tells only odd phases from even ones, so a consumer waits for all, even of pairs that it does not use.
    """
    _free_stage(_wait_for_pair(kv_full, i_pair))


@gluon.jit
def consume(I_CONSUMER: gl.constexpr, shared, out_ptr, qk_scale, D: gl.constexpr, ACROSS_HEADS: gl.constexpr):
    """Run consumer I_CONSUMER: compute and store its unit of each tile, until a ticket has no steps."""
    tickets, q_tiles, k_tiles, v_tiles, barriers = shared
    ticket_full, q_full, q_empty, kv_full = barriers
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP_KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    b_zero = gl.zeros([UNIT_QUERIES, STEP_KEYS], gl.float32, SCORES)
    i_pair = 0
    i_ticket = 0
    if I_CONSUMER == CONSUMERS - 1:
        _pass_turn(I_CONSUMER)  # the first turn is consumer 0's
    n_steps, n_first_keys, n_rows, n_first_head_units = wait_for_ticket(
        tickets, ticket_full, 0, I_CONSUMER, ACROSS_HEADS
    )
    while n_steps > 0:
        i_slot = i_ticket & 1
        mbarrier.wait(q_full.index(i_slot), (i_ticket >> 1) & 1)
        stride = 1
        if ACROSS_HEADS:
            stride = 1 + (n_first_head_units < CONSUMERS).to(gl.int32)
        pair_end = i_pair + stride * (n_steps + 1)
        if n_rows > I_CONSUMER * UNIT_QUERIES:
            if ACROSS_HEADS:  # noqa: SIM102 (known when compiling)
                if n_first_head_units <= I_CONSUMER:
                    _skip_pair(kv_full, i_pair)
                    i_pair += 1
            i_last_pair = i_pair + stride * n_steps
            b_q = q_tiles[0].index(i_slot * CONSUMERS + I_CONSUMER)
            b_q_rest = q_tiles[1].index(i_slot * CONSUMERS + I_CONSUMER)
            i_stage = _wait_for_pair(kv_full, i_pair)
            b_s = _scores(b_q, b_q_rest, k_tiles[0].index(i_stage), k_tiles[1].index(i_stage), b_zero, D)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            _free_stage(i_stage)
            o_key = gl.arange(0, STEP_KEYS, layout=gl.SliceLayout(0, SCORES))
            b_s = gl.where((o_key < n_first_keys)[None, :], b_s, float("-inf"))
            b_max = gl.max(b_s, 1)
            b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
            b_sums = _thread_sums(b_p)
            b_pairs = _pack(b_p, dtype)
            b_out = gl.zeros([UNIT_QUERIES, 64], gl.float32, OUT)
            b_rest = gl.zeros([UNIT_QUERIES, 16], gl.float32, REST)
            for i_next_pair in range(i_pair + stride, i_last_pair, stride):
                i_stage = _wait_for_pair(kv_full, i_next_pair)
                b_v, b_v_rest = v_tiles[0].index(i_stage), v_tiles[1].index(i_stage)
                b_k, b_k_rest = k_tiles[0].index(i_stage), k_tiles[1].index(i_stage)
                _wait_for_turn(I_CONSUMER)
                if D > 64:
                    b_out, b_rest, b_operand = _add_values(b_pairs, b_v, b_v_rest, b_out, b_rest, dtype, D)
                    b_out, b_rest, b_operand = warpgroup_mma_wait(0, deps=[b_out, b_rest, b_operand])
                    b_s = _scores(b_q, b_q_rest, b_k, b_k_rest, b_zero, D)
                else:
                    b_s = _scores(b_q, b_q_rest, b_k, b_k_rest, b_zero, D)
                    b_out, b_rest, b_operand = _add_values(b_pairs, b_v, b_v_rest, b_out, b_rest, dtype, D)
                _pass_turn(I_CONSUMER)
                if D > 64:
                    b_s = warpgroup_mma_wait(0, deps=[b_s])
                    _free_stage(i_stage)
                else:
                    b_s = warpgroup_mma_wait(1, deps=[b_s])
                if ACROSS_HEADS:  # noqa: SIM102
                    if stride > 1:
                        _skip_pair(kv_full, i_next_pair - 1)
                b_row_max = gl.max(b_s, 1)
                b_new_max = gl.where((b_row_max - b_max) * qk_scale > MAX_GROWTH, b_row_max, b_max)
                b_decay = (b_max - b_new_max) * qk_scale
                b_max = b_new_max
                b_p = _exp2(b_s * qk_scale - (b_max * qk_scale)[:, None])
                if D > 64:
                    b_alpha = _exp2(b_decay)
                else:
                    b_pairs = _pack(b_p, dtype)
                    b_alpha = _exp2_unless_zeros(b_decay)
                    b_alpha, b_pairs, b_out, b_operand = warpgroup_mma_wait(
                        0, deps=[b_alpha, b_pairs, b_out, b_operand]
                    )
                    _free_stage(i_stage)
                if D % 16 == 0:
                    SUMS: gl.constexpr = gl.SliceLayout(1, b_sums.type.layout)
                    b_sums *= gl.convert_layout(b_alpha, SUMS, assert_trivial=True)[:, None]
                    b_sums += _thread_sums(b_p)
                if D > 64:  # not before the sums, where it costs registers and moves
                    b_pairs = _pack(b_p, dtype)
                b_out = _rescale(b_out, gl.convert_layout(b_alpha, gl.SliceLayout(1, OUT), assert_trivial=True))
                if D > 64:
                    b_rest *= gl.convert_layout(b_alpha, gl.SliceLayout(1, REST), assert_trivial=True)[:, None]
            n_rows, i_out, row_stride = read_output_location(tickets, i_ticket, I_CONSUMER, ACROSS_HEADS)
            row_stride *= 8
            mbarrier.arrive(q_empty.index(i_slot), count=1)
            if ACROSS_HEADS:  # noqa: SIM102
                if stride > 1:
                    _skip_pair(kv_full, i_last_pair - 1)
            i_stage = _wait_for_pair(kv_full, i_last_pair)
            b_out, b_rest, b_operand = _add_values(
                b_pairs, v_tiles[0].index(i_stage), v_tiles[1].index(i_stage), b_out, b_rest, dtype, D
            )
            b_out, b_rest, b_operand = warpgroup_mma_wait(0, deps=[b_out, b_rest, b_operand])
            _free_stage(i_stage)
            if ACROSS_HEADS:  # noqa: SIM102
                if i_last_pair < pair_end - 1:
                    _skip_pair(kv_full, i_last_pair + 1)
            if D % 16 != 0:
                o_rest = gl.arange(0, 16, layout=gl.SliceLayout(0, REST))
                b_sum = gl.sum(gl.where((o_rest == D - 64)[None, :], b_rest, 0.0), 1)
            else:
                b_sum = gl.sum(b_sums, 1)
            b_inverse = 1.0 / b_sum
            p_out = out_ptr + i_out.to(gl.int64) * 8 + I_CONSUMER * UNIT_QUERIES * row_stride
            _store(p_out, row_stride, n_rows - I_CONSUMER * UNIT_QUERIES, b_out, b_inverse, 64)
            if D > 64:
                _store(p_out + 64, row_stride, n_rows - I_CONSUMER * UNIT_QUERIES, b_rest, b_inverse, D - 64)
        else:  # the tile has no unit for this consumer, which only arrives where the others wait for it
            mbarrier.arrive(q_empty.index(i_slot), count=1)
            for i_next_pair in range(i_pair, pair_end):
                _skip_pair(kv_full, i_next_pair)
                # A tile's first and last products have no turns. A tile of two heads that lacks a unit has no others.
                if (i_next_pair > i_pair) & (i_next_pair < pair_end - 1) & (stride == 1):
                    _wait_for_turn(I_CONSUMER)
                    _pass_turn(I_CONSUMER)
        i_pair = pair_end
        i_ticket += 1
        n_steps, n_first_keys, n_rows, n_first_head_units = wait_for_ticket(
            tickets, ticket_full, i_ticket, I_CONSUMER, ACROSS_HEADS
        )
    if I_CONSUMER == 0:
        _wait_for_turn(I_CONSUMER)  # leave no arrivals behind
