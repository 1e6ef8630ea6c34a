"""Attention within segments of any length on Hopper, in Gluon: the operation of `varlen_attention`, faster on sm_90.

The kernel is persistent, one program per multiprocessor, with producer/consumer warp specialization: a producer warp
and three consumer warpgroups. A *unit* is 64 queries of one head. A *tile* is up to three units, one for each consumer,
which share the segment's keys, 128 a *step*. A *pair* is what a consumer needs at once: the keys of a step, and the
values of the step before. Tiles are scheduled dynamically. For each tile:

1. The producer takes the tile's number from a counter in global memory, waits for `q_empty`, starts TMA copies of Q
   that complete `q_full`, writes the tile's work descriptor, its *ticket*, and arrives at `ticket_full`.
2. The producer starts copies of the pairs, one more than there are steps: the first has only keys, the last only
   values. They complete `kv_full`. It waits for `KV_EMPTY` before it overwrites a stage, so it runs up to STAGES pairs
   ahead.
3. For each pair a consumer waits for `kv_full` and, except for a tile's first and last, for its turn. It issues
   out += P V and S = Q Kᵀ, passes the turn to the next consumer, waits for the products, arrives at `KV_EMPTY`, and
   computes P = 2^(S - maximum); at head_dim 64 it does so before it has waited for P V.
4. Before the last pair a consumer reads from the ticket where its rows go and arrives at `q_empty`, which frees Q and
   the ticket. After it, it stores the output.

There are two buffers for Q and tickets, and STAGES for pairs.

Where it saves a wave, tiles continue across heads (ACROSS_HEADS). The pairs of such a tile alternate between its two
heads, and a consumer skips the pairs of the other head.

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

from qwenvit.kernels.attention.hopper_consumer import consume
from qwenvit.kernels.attention.hopper_launch import Operand, cached_launch, contiguous_copy, operand_key
from qwenvit.kernels.attention.hopper_producer import STAGES, STEP_KEYS, allocate_tiles, make_barriers, produce
from qwenvit.kernels.attention.hopper_scheduler import CONSUMERS, UNIT_QUERIES, saves_a_wave
from qwenvit.kernels.attention.pad_values import pad_with_ones
from qwenvit.kernels.attention.varlen import LOG2_E
from qwenvit.kernels.compile_options import COMPILE_OPTIONS
from qwenvit.kernels.device import capability, multiprocessors

MAX_REGISTERS = 128
"""Registers per thread at launch. Registers are allotted to four warpgroups (the producer's warp counts as one), and
3 · 152 + 56 = 3 · 160 + 32 = 4 · 128 uses all of a multiprocessor's. Both products in flight need 160 (head_dim 64)."""


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
            (consume, (0, shared, out_ptr, qk_scale, D, ACROSS_HEADS)),
            (consume, (1, shared, out_ptr, qk_scale, D, ACROSS_HEADS)),
            (consume, (2, shared, out_ptr, qk_scale, D, ACROSS_HEADS)),
            (
                produce,
                (shared, q_pair, k_pair, v_pair, cu_seqlens_ptr, counters_ptr, n_segments, S, H, D, ACROSS_HEADS),
            ),
        ],
        [4, 4, 1],
        [160, 160, 32] if D == 64 else [152, 152, 56],
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or capability(device) != (9, 0):
        raise ValueError(f"device: expected a GPU of compute capability 9.0, got {device}")
    return multiprocessors(device)


def end_with_ones(v: Operand) -> Operand:
    """Return values whose channels beyond 64 end in ones up to a multiple of 16, from values [S, H, D] if need be."""
    if not isinstance(v, Tensor):
        if v[1].shape[2] % 16:
            raise ValueError(f"v: expected a second tensor padded to 16 channels, got {v[1].shape[2]}")
        return v
    if v.shape[2] % 16 == 0:
        return v
    return v[..., :64], pad_with_ones(v[..., 64:])


_kernels: dict[tuple, Any] = {}
"""Compiled kernels by device, dtype, head_dim and ACROSS_HEADS."""


def hopper_attention(q: Operand, k: Operand, v: Operand, cu_seqlens: Tensor, scale: float, out: Tensor) -> None:
    """Write attention within segments of any length into `out [S, H, D]`, in bfloat16 or float16.

    `out` is contiguous and starts at a multiple of 16 bytes. Queries, keys (both rotated) and values are `[S, H, D]`
    each, or two tensors: `[S, H, 64]`, and the other D - 64 channels. Those of queries and keys may be padded to 16
    with zeros, those of values must be padded to 16 with ones. Values of D = 72 in one tensor may be `[S, H, 80]` with
    ones; without them they are copied. I/O: reads all three once, if K and V stay in L2, and writes `out`. A segment of
    L tokens takes 4 L² H D FLOPs. Raises ValueError unless `out` is on a GPU of compute capability 9.0, and for values
    in two tensors without the ones' channels.
    """
    v = end_with_ones(v)
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
            kernel = _hopper_attention[programs, 1, 1](
                *arguments, num_warps=4, maxnreg=MAX_REGISTERS, **COMPILE_OPTIONS
            )
            _kernels[device, dtype, D, across_heads] = kernel
            return
        launch.set_kernel(kernel)
    launch(out, cu_seqlens)
