"""Patch embedding: pixel values times weights, plus bias and learned positions, written in the tower's order.

`_fused` does all of it in one GEMM: rows are read through the window index and converted as they come, positions are
interpolated in the epilogue. `_stage` (convert and reorder the rows) and `_add_positions` are the passes around a
cuBLAS GEMM where that is faster.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.norm import load_row, row_config, store_row


@triton.jit
def _source(i_out, index_ptr, UNIT: tl.constexpr):
    """The patch, in reading order, at a place (or a block of places) of the tower's order."""
    i_in = i_out.to(tl.int64)
    if index_ptr is not None:
        i_in = tl.load(index_ptr + i_in // UNIT) * UNIT + i_in % UNIT
    return i_in


@triton.jit
def _add_positions(
    x_ptr,  # shape (S, C); None for the positions alone
    table_ptr,  # shape (entries, C)
    taps_ptr,  # int64, entries of the table around each patch, shape (S, 4)
    tap_weights_ptr,  # fp32, shape (S, 4)
    index_ptr,  # int64, the token at each place of the output, shape (S / UNIT,); None for their own order
    y_ptr,  # shape (S, C)
    UNIT: tl.constexpr,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    i_in = _source(i_out, index_ptr, UNIT)
    b_main = tl.zeros([MAIN], tl.float32)
    b_tail = tl.zeros([TAIL], tl.float32)
    for i_tap in tl.static_range(4):
        i_entry = tl.load(taps_ptr + i_in * 4 + i_tap)
        tap_weight = tl.load(tap_weights_ptr + i_in * 4 + i_tap)
        b_tap_main, b_tap_tail = load_row(table_ptr + i_entry * C, C, MAIN, TAIL)
        b_main += tap_weight * b_tap_main
        b_tail += tap_weight * b_tap_tail
    if x_ptr is not None:
        b_x_main, b_x_tail = load_row(x_ptr + i_in * C, C, MAIN, TAIL)
        b_main += b_x_main
        b_tail += b_x_tail
    store_row(y_ptr + i_out * C, b_main, b_tail, C, MAIN, TAIL)


@triton.jit
def _stage(
    pixel_ptr,  # shape (S, K)
    index_ptr,  # int64, shape (S / UNIT,); None for the rows' own order
    y_ptr,  # shape (S, K), rows `stride_y` apart
    stride_y,
    UNIT: tl.constexpr,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    b_main, b_tail = load_row(pixel_ptr + _source(i_out, index_ptr, UNIT) * K, K, MAIN, TAIL)
    store_row(y_ptr + i_out * stride_y, b_main, b_tail, K, MAIN, TAIL)


@triton.jit(do_not_specialize=["S"])
def _fused(
    pixel_ptr,  # shape (S, K)
    weight_ptr,  # shape (N, K), rows `stride_weight` apart
    bias_ptr,  # shape (N,); None where there is none
    table_ptr,  # shape (entries, N); None where there are no learned positions, nor the next two
    taps_ptr,  # int64, shape (S, 4)
    tap_weights_ptr,  # fp32, shape (S, 4)
    index_ptr,  # int64, shape (S / UNIT,); None for the rows' own order
    y_ptr,  # shape (S, N)
    S,
    stride_weight,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_tile = tl.program_id(0)
    n_across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    o_out = i_tile // n_across * BLOCK_S + tl.arange(0, BLOCK_S)
    o_n = i_tile % n_across * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_out = (o_out < S)[:, None] & (o_n < N)[None, :]
    o_in = _source(tl.minimum(o_out, S - 1), index_ptr, UNIT)  # rows past the end read the last, and write nothing
    o_n = tl.minimum(o_n, N - 1)
    p_pixel = pixel_ptr + o_in[:, None] * K + o_k[None, :]
    p_weight = weight_ptr + o_n[None, :].to(tl.int64) * stride_weight + o_k[:, None]
    b_y = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        m_k = o_k < K - i_k
        b_pixel = tl.load(p_pixel + i_k, mask=m_k[None, :], other=0)
        b_weight = tl.load(p_weight + i_k, mask=m_k[:, None], other=0)
        b_y = tl.dot(b_pixel.to(b_weight.dtype), b_weight, b_y, input_precision="ieee")
    if bias_ptr is not None:
        b_y += tl.load(bias_ptr + o_n)[None, :].to(tl.float32)
    if table_ptr is not None:
        for i_tap in range(4):
            b_entry = tl.load(taps_ptr + o_in * 4 + i_tap)
            b_tap_weight = tl.load(tap_weights_ptr + o_in * 4 + i_tap)
            b_tap = tl.load(table_ptr + b_entry[:, None] * N + o_n[None, :])
            b_y += b_tap_weight[:, None] * b_tap.to(tl.float32)
    tl.store(y_ptr + o_out[:, None].to(tl.int64) * N + o_n[None, :], b_y, mask=m_out)


@dataclass(frozen=True)
class GemmConfig:
    """Tile of the fused GEMM."""

    block_s: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def fused_config(S: int, dtype: torch.dtype) -> GemmConfig | None:
    """The fused GEMM's tile; None where passes around a cuBLAS GEMM are faster."""
    if dtype == torch.float32:  # cuBLAS may use TF32, by a switch that is not ours
        return GemmConfig(64, 64, 16, 4, 3)
    return None


def _stage_rows(pixel_values: Tensor, window_index: Tensor | None, merge_unit: int, dtype: torch.dtype) -> Tensor:
    """Rows in the dtype and order wanted, each starting a 128-byte line; what lies between them is never read."""
    S, K = pixel_values.shape
    line = 128 // dtype.itemsize
    rows = pixel_values.new_empty((S, triton.cdiv(K, line) * line), dtype=dtype)
    config = row_config(K)
    if S:
        with torch.cuda.device_of(rows):
            _stage[(S,)](
                pixel_values, window_index, rows, rows.stride(0), UNIT=merge_unit, K=K, MAIN=config.main,
                TAIL=config.tail, num_warps=config.num_warps,
            )  # fmt: skip
    return rows[:, :K]


def _add_positions_into(
    y: Tensor,
    x: Tensor | None,
    table: Tensor,
    taps: Tensor,
    tap_weights: Tensor,
    window_index: Tensor | None,
    merge_unit: int,
) -> None:
    S, C = y.shape
    config = row_config(C)
    if S:
        with torch.cuda.device_of(y):  # Triton launches on the current device, which need not be the tensor's
            _add_positions[(S,)](
                x, table, taps, tap_weights, window_index, y, UNIT=merge_unit, C=C, MAIN=config.main, TAIL=config.tail,
                num_warps=config.num_warps,
            )  # fmt: skip


def interpolate_positions(table: Tensor, taps: Tensor, tap_weights: Tensor) -> Tensor:
    """Learned positions of patches; see `qwenvit.ops.interpolate_positions`.

    I/O: reads table, taps and tap_weights, writes y. 8 FLOPs an element.
    """
    y = table.new_empty((taps.shape[0], table.shape[1]))
    _add_positions_into(y, None, table, taps, tap_weights, None, 1)
    return y


def add_positions(
    x: Tensor, table: Tensor, taps: Tensor, tap_weights: Tensor, window_index: Tensor | None, merge_unit: int
) -> Tensor:
    """Patches and their learned positions; see `qwenvit.ops.add_positions`.

    I/O: reads x, table, taps and tap_weights, writes y. 9 FLOPs an element.
    """
    y = torch.empty_like(x)
    _add_positions_into(y, x, table, taps, tap_weights, window_index, merge_unit)
    return y


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    taps: Tensor | None,
    tap_weights: Tensor | None,
    window_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    """Patches embedded; see `qwenvit.ops.patch_embed`.

    I/O: reads pixel_values, weight and table, writes y; around cuBLAS, converted or reordered rows are written and
    read once more, and so is y where there are positions. 2·S·K·N FLOPs.
    """
    S, K = pixel_values.shape
    N = weight.shape[0]
    config = fused_config(S, weight.dtype)
    if config is not None:
        y = weight.new_empty((S, N))
        if S:
            with torch.cuda.device_of(y):
                _fused[(triton.cdiv(S, config.block_s) * triton.cdiv(N, config.block_n),)](
                    pixel_values, weight, bias, table, taps, tap_weights, window_index, y, S, weight.stride(0),
                    UNIT=merge_unit, N=N, K=K, BLOCK_S=config.block_s, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                    num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
        return y
    reorder_rows = window_index if table is None else None  # with positions, the pass that adds them reorders
    if pixel_values.dtype != weight.dtype or reorder_rows is not None:
        pixel_values = _stage_rows(pixel_values, reorder_rows, merge_unit, weight.dtype)
    x = F.linear(pixel_values, weight, bias)
    if table is None:
        return x
    y = x if window_index is None else torch.empty_like(x)
    _add_positions_into(y, x, table, taps, tap_weights, window_index, merge_unit)
    return y


LIBRARY = torch.library.Library("qwenvit", "FRAGMENT")
LIBRARY.define("interpolate_positions(Tensor table, Tensor taps, Tensor tap_weights) -> Tensor")
LIBRARY.define(
    "add_positions(Tensor x, Tensor table, Tensor taps, Tensor tap_weights, Tensor? window_index, int merge_unit) "
    "-> Tensor"
)
LIBRARY.define(
    "patch_embed(Tensor pixel_values, Tensor weight, Tensor? bias, Tensor? table, Tensor? taps, Tensor? tap_weights, "
    "Tensor? window_index, int merge_unit) -> Tensor"
)
for _device in ("CUDA", "CPU"):  # on a CPU, Triton's interpreter
    LIBRARY.impl("interpolate_positions", interpolate_positions, _device)
    LIBRARY.impl("add_positions", add_positions, _device)
    LIBRARY.impl("patch_embed", patch_embed, _device)


@torch.library.register_fake("qwenvit::interpolate_positions", lib=LIBRARY)
def _(table, taps, *_):
    return table.new_empty((taps.shape[0], table.shape[1]))


@torch.library.register_fake("qwenvit::patch_embed", lib=LIBRARY)
def _(pixel_values, weight, *_):
    return weight.new_empty((pixel_values.shape[0], weight.shape[0]))


torch.library.register_fake("qwenvit::add_positions", lambda x, *_: torch.empty_like(x), lib=LIBRARY)
interpolate_positions_op = torch.ops.qwenvit.interpolate_positions.default
add_positions_op = torch.ops.qwenvit.add_positions.default
patch_embed_op = torch.ops.qwenvit.patch_embed.default
