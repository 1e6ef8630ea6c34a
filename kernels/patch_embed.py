"""Patch embedding: pixel values times weights, plus bias and learned positions, written in the tower's order.

`_fused` is all of it in one GEMM: pixel values are converted as they come, and its epilogue interpolates positions and
writes each row to its place. `_stage` (convert and reorder the rows) and `_position_rows` are the passes around a
cuBLAS GEMM where that is faster.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qwenvit.kernels.norm import load_row, row_config, store_row


@triton.jit
def _place(i_in, place_ptr, UNIT: tl.constexpr):
    """Where a patch (or a block of them) goes; `place_ptr` is int64, shape (S / UNIT,), or None for their own order."""
    i_out = i_in.to(tl.int64)
    if place_ptr is not None:
        i_out = tl.load(place_ptr + i_out // UNIT) * UNIT + i_out % UNIT
    return i_out


@triton.jit
def _position_rows(
    x_ptr,  # shape (S, C); None for the positions alone
    table_ptr,  # shape (entries, C)
    taps_ptr,  # int64, entries of the table around each patch, shape (S, 4)
    tap_weights_ptr,  # fp32, shape (S, 4)
    bias_ptr,  # shape (C,); None where there is none
    place_ptr,  # int64, shape (S / UNIT,); None for the rows' own order
    y_ptr,  # shape (S, C)
    UNIT: tl.constexpr,
    C: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_in = tl.program_id(0).to(tl.int64)
    if x_ptr is not None:
        b_x_main, b_x_tail = load_row(x_ptr + i_in * C, C, MAIN, TAIL)
    b_main = tl.zeros([MAIN], tl.float32)
    b_tail = tl.zeros([TAIL], tl.float32)
    for i_tap in tl.static_range(4):
        i_entry = tl.load(taps_ptr + i_in * 4 + i_tap)
        tap_weight = tl.load(tap_weights_ptr + i_in * 4 + i_tap)
        b_tap_main, b_tap_tail = load_row(table_ptr + i_entry * C, C, MAIN, TAIL)
        b_main += tap_weight * b_tap_main
        b_tail += tap_weight * b_tap_tail
    if bias_ptr is not None:
        b_bias_main, b_bias_tail = load_row(bias_ptr, C, MAIN, TAIL)
        b_main += b_bias_main
        b_tail += b_bias_tail
    if x_ptr is not None:
        b_main += b_x_main
        b_tail += b_x_tail
    store_row(y_ptr + _place(i_in, place_ptr, UNIT) * C, b_main, b_tail, C, MAIN, TAIL)


@triton.jit
def _stage(
    pixel_ptr,  # shape (S, K)
    place_ptr,  # int64, shape (S / UNIT,); None for the rows' own order
    y_ptr,  # shape (S, K), rows `stride_y` apart
    stride_y,
    UNIT: tl.constexpr,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_in = tl.program_id(0).to(tl.int64)
    b_main, b_tail = load_row(pixel_ptr + i_in * K, K, MAIN, TAIL)
    store_row(y_ptr + _place(i_in, place_ptr, UNIT) * stride_y, b_main, b_tail, K, MAIN, TAIL)


@triton.jit
def _finish(
    b_y,  # fp32 products, shape (BLOCK_S, WIDTH)
    o_in,
    o_out,
    i_n,
    bias_ptr,
    table_ptr,
    taps_ptr,
    tap_weights_ptr,
    y_ptr,
    S,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add bias and positions to a piece of a tile, and write it."""
    o_n = i_n + tl.arange(0, WIDTH)
    m_in = o_in < S
    m_n = o_n < N
    m_y = m_in[:, None] & m_n[None, :]
    if bias_ptr is not None:
        b_y += tl.load(bias_ptr + o_n, mask=m_n, other=0)[None, :].to(tl.float32)
    if table_ptr is not None:
        for i_tap in tl.range(4, num_stages=1):
            b_entry = tl.load(taps_ptr + o_in.to(tl.int64) * 4 + i_tap, mask=m_in, other=0)
            b_tap_weight = tl.load(tap_weights_ptr + o_in.to(tl.int64) * 4 + i_tap, mask=m_in, other=0)
            b_tap = tl.load(table_ptr + b_entry[:, None] * N + o_n[None, :], mask=m_y, other=0)
            b_y += b_tap_weight[:, None] * b_tap.to(tl.float32)
    tl.store(y_ptr + o_out[:, None] * N + o_n[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["S"])
def _fused(
    pixel,  # shape (S, K); a descriptor of (BLOCK_S, BLOCK_K) blocks if TMA, else a pointer
    weight,  # shape (N, K); a descriptor of (BLOCK_N, BLOCK_K) blocks if TMA, else a pointer
    bias_ptr,  # shape (N,); None where there is none
    table_ptr,  # shape (entries, N); None where there are no learned positions, nor the next two
    taps_ptr,  # int64, shape (S, 4)
    tap_weights_ptr,  # fp32, shape (S, 4)
    place_ptr,  # int64, shape (S / UNIT,); None for the rows' own order
    y_ptr,  # shape (S, N)
    S,
    stride_weight,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
):
    n_across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    n_tiles = tl.cdiv(S, BLOCK_S) * n_across
    o_k = tl.arange(0, BLOCK_K)
    for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=PERSISTENT):
        i_s = i_tile // n_across * BLOCK_S
        i_n = i_tile % n_across * BLOCK_N
        o_in = i_s + tl.arange(0, BLOCK_S)
        if not TMA:  # rows and columns past the end repeat the last, and are not written
            o_row = tl.minimum(o_in, S - 1).to(tl.int64)
            o_column = tl.minimum(i_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
            p_pixel = pixel + o_row[:, None] * K + o_k[None, :]
            p_weight = weight + o_column[:, None] * stride_weight + o_k[None, :]
        b_y = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
        for i_k in range(0, K, BLOCK_K):
            if TMA:
                b_pixel = pixel.load([i_s, i_k])
                b_weight = weight.load([i_n, i_k])
            else:
                m_k = (o_k < K - i_k)[None, :]
                b_pixel = tl.load(p_pixel + i_k, mask=m_k, other=0)
                b_weight = tl.load(p_weight + i_k, mask=m_k, other=0)
            b_y = tl.dot(b_pixel.to(b_weight.dtype), b_weight.T, b_y, input_precision="ieee")
        o_out = _place(tl.minimum(o_in, S - 1), place_ptr, UNIT)
        if PARTS == 1:
            _finish(b_y, o_in, o_out, i_n, bias_ptr, table_ptr, taps_ptr, tap_weights_ptr, y_ptr, S, N, BLOCK_N)
        else:  # half a tile at a time needs fewer registers
            HALF: tl.constexpr = BLOCK_N // 2
            b_left, b_right = tl.split(b_y.reshape(BLOCK_S, 2, HALF).permute(0, 2, 1))
            _finish(b_left, o_in, o_out, i_n, bias_ptr, table_ptr, taps_ptr, tap_weights_ptr, y_ptr, S, N, HALF)
            _finish(b_right, o_in, o_out, i_n + HALF, bias_ptr, table_ptr, taps_ptr, tap_weights_ptr, y_ptr, S, N, HALF)


@dataclass(frozen=True)
class GemmConfig:
    """Tile and schedule of the fused GEMM."""

    block_s: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool
    persistent: bool
    parts: int


def fused_config(dtype: torch.dtype) -> GemmConfig | None:
    """The fused GEMM's tile; None where passes around a cuBLAS GEMM are faster."""
    if dtype == torch.float32:  # cuBLAS may use TF32, by a switch that is not ours
        return GemmConfig(64, 64, 16, 4, 4, tma=False, persistent=False, parts=1)
    return None


def launch_fused(
    config: GemmConfig,
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    taps: Tensor | None,
    tap_weights: Tensor | None,
    restore_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    S, K = pixel_values.shape
    N = weight.shape[0]
    y = weight.new_empty((S, N))
    tiles = triton.cdiv(S, config.block_s) * triton.cdiv(N, config.block_n)
    if not S:
        return y
    pixel, weights = pixel_values, weight
    if config.tma:
        pixel = TensorDescriptor.from_tensor(pixel_values, [config.block_s, config.block_k])
        weights = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
    programs = tiles
    if config.persistent:
        programs = min(tiles, torch.cuda.get_device_properties(y.device).multi_processor_count)
    with torch.cuda.device_of(y):  # Triton launches on the current device, which need not be the tensor's
        _fused[(programs,)](
            pixel, weights, bias, table, taps, tap_weights, restore_index, y, S, weight.stride(0), UNIT=merge_unit,
            N=N, K=K, BLOCK_S=config.block_s, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PERSISTENT=config.persistent, TMA=config.tma, PARTS=config.parts, num_warps=config.num_warps,
            num_stages=config.num_stages,
        )  # fmt: skip
    return y


def _stage_rows(pixel_values: Tensor, restore_index: Tensor | None, merge_unit: int, dtype: torch.dtype) -> Tensor:
    """Rows in the dtype and order wanted, each starting a 128-byte line; what lies between them is never read."""
    S, K = pixel_values.shape
    line = 128 // dtype.itemsize
    rows = pixel_values.new_empty((S, triton.cdiv(K, line) * line), dtype=dtype)
    config = row_config(K)
    if S:
        with torch.cuda.device_of(rows):
            _stage[(S,)](
                pixel_values, restore_index, rows, rows.stride(0), UNIT=merge_unit, K=K, MAIN=config.main,
                TAIL=config.tail, num_warps=1,
            )  # fmt: skip
    return rows[:, :K]


def _write_positions(
    y: Tensor,
    x: Tensor | None,
    table: Tensor,
    taps: Tensor,
    tap_weights: Tensor,
    bias: Tensor | None,
    restore_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    S, C = y.shape
    config = row_config(C)
    if S:
        with torch.cuda.device_of(y):
            _position_rows[(S,)](
                x, table, taps, tap_weights, bias, restore_index, y, UNIT=merge_unit, C=C, MAIN=config.main,
                TAIL=config.tail, num_warps=1,
            )  # fmt: skip
    return y


def interpolate_positions(table: Tensor, taps: Tensor, tap_weights: Tensor) -> Tensor:
    """Learned positions of patches; see `qwenvit.ops.interpolate_positions`.

    I/O: reads table, taps and tap_weights, writes y. 8 FLOPs an element.
    """
    y = table.new_empty((taps.shape[0], table.shape[1]))
    return _write_positions(y, None, table, taps, tap_weights, None, None, 1)


def add_positions(
    x: Tensor, table: Tensor, taps: Tensor, tap_weights: Tensor, restore_index: Tensor | None, merge_unit: int
) -> Tensor:
    """Patches and their learned positions; see `qwenvit.ops.add_positions`.

    I/O: reads x, table, taps and tap_weights, writes y. 9 FLOPs an element.
    """
    return _write_positions(torch.empty_like(x), x, table, taps, tap_weights, None, restore_index, merge_unit)


def patch_embed(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    taps: Tensor | None,
    tap_weights: Tensor | None,
    restore_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    """Patches embedded; see `qwenvit.ops.patch_embed`.

    I/O: reads pixel_values, weight and table, writes y; around cuBLAS, rows to be converted or reordered are written
    and read once more, and so is y where there are positions. 2·S·K·N FLOPs.
    """
    config = fused_config(weight.dtype)
    if config is not None:
        return launch_fused(
            config, pixel_values, weight, bias, table, taps, tap_weights, restore_index, merge_unit
        )  # fmt: skip
    rows = pixel_values
    if rows.dtype != weight.dtype or restore_index is not None and table is None:
        rows = _stage_rows(rows, restore_index if table is None else None, merge_unit, weight.dtype)
    x = F.linear(rows, weight, bias)
    if table is None or taps is None or tap_weights is None:
        return x
    y = x if restore_index is None else torch.empty_like(x)
    return _write_positions(y, x, table, taps, tap_weights, None, restore_index, merge_unit)


LIBRARY = torch.library.Library("qwenvit", "FRAGMENT")
LIBRARY.define("interpolate_positions(Tensor table, Tensor taps, Tensor tap_weights) -> Tensor")
LIBRARY.define(
    "add_positions(Tensor x, Tensor table, Tensor taps, Tensor tap_weights, Tensor? restore_index, int merge_unit) "
    "-> Tensor"
)
LIBRARY.define(
    "patch_embed(Tensor pixel_values, Tensor weight, Tensor? bias, Tensor? table, Tensor? taps, Tensor? tap_weights, "
    "Tensor? restore_index, int merge_unit) -> Tensor"
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
