"""Patch embedding: pixel values times weights, plus bias and learned positions, written in the tower's order.

With learned positions, `_add_position_rows` writes them (plus the bias) in the tower's order, `_convert_rows` writes
the pixel values in that order and in the weight's dtype, and a cuBLAS product adds to the positions. Without them, and
with pixel values in the weight's dtype already, one product of our own can write its rows in the tower's order
(`_embed_patches`). Reordering moves whole tokens of MERGE_UNIT patches: `restore_ptr` has each token's place.

Interpolating positions or converting pixel values inside the product was slower than separate passes (TUNING.md).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.device import capability, multiprocessors, tuning
from qwenvit.kernels.gemm.tiles import (
    TensorDescriptor,
    Tile,
    accumulate,
    add_bias,
    split_halves,
    tile_at,
    uses_tma,
    wave_efficiency,
)
from qwenvit.kernels.norm import load_row, row_config, store_row
from qwenvit.kernels.registration import register

PASS_WARPS = 1
"""Warps of a program of `_add_position_rows` and `_convert_rows`, which processes one row (TUNING.md)."""


@triton.jit
def _output_row(
    i_in,
    restore_ptr,  # int64, shape (S / MERGE_UNIT,): place of each token in the tower's order; None for the order given
    MERGE_UNIT: tl.constexpr,
):
    """Return the output row of a patch, or of a block of patches."""
    i_out = i_in.to(tl.int64)
    if restore_ptr is not None:
        i_out = tl.load(restore_ptr + i_out // MERGE_UNIT) * MERGE_UNIT + i_out % MERGE_UNIT
    return i_out


@triton.jit
def _add_position_rows(
    x_ptr,  # shape (S, C); None writes the positions alone
    table_ptr,  # shape (entries, C)
    taps_ptr,  # int64, shape (S, 4): table entries around each patch
    tap_weights_ptr,  # fp32, shape (S, 4): bilinear weights of those entries
    bias_ptr,  # shape (C,), or None
    restore_ptr,  # int64, shape (S / MERGE_UNIT,): place of each token; None for the order given
    y_ptr,  # shape (S, C)
    MERGE_UNIT: tl.constexpr,
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
    store_row(y_ptr + _output_row(i_in, restore_ptr, MERGE_UNIT) * C, b_main, b_tail, C, MAIN, TAIL)


@triton.jit
def _convert_rows(
    pixel_ptr,  # shape (S, K)
    restore_ptr,  # int64, shape (S / MERGE_UNIT,): place of each token; None for the order given
    y_ptr,  # shape (S, K), row stride `stride_y`
    stride_y,
    MERGE_UNIT: tl.constexpr,
    K: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    i_in = tl.program_id(0).to(tl.int64)
    b_main, b_tail = load_row(pixel_ptr + i_in * K, K, MAIN, TAIL)
    store_row(y_ptr + _output_row(i_in, restore_ptr, MERGE_UNIT) * stride_y, b_main, b_tail, K, MAIN, TAIL)


@triton.jit(do_not_specialize=["M"])
def _embed_patches(
    pixels,  # shape (M, K): TMA descriptor
    weight,  # shape (N, K): TMA descriptor of shape (1, 1, N, K)
    bias_ptr,  # shape (N,), or None
    restore_ptr,  # int64, shape (M / MERGE_UNIT,): place of each token
    out_ptr,  # shape (M, N)
    M,
    MERGE_UNIT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    N_COL_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    n_row_tiles = tl.cdiv(M, BLOCK_M)
    for i_tile in tl.range(tl.program_id(0), n_row_tiles * N_COL_TILES, tl.num_programs(0), flatten=True):
        i_row, i_col = tile_at(i_tile, n_row_tiles, N_COL_TILES, BAND)
        i_row *= BLOCK_M
        i_col *= BLOCK_N
        b_acc = accumulate(pixels, weight, i_row, 0, 0, i_col, None, M, K, BLOCK_M, BLOCK_N, BLOCK_K, True)
        o_row = i_row + tl.arange(0, BLOCK_M)
        p_row = out_ptr + _output_row(tl.minimum(o_row, M - 1), restore_ptr, MERGE_UNIT)[:, None] * N
        b_left, b_right = split_halves(b_acc)
        for i_half in tl.static_range(2):
            o_col = i_col + i_half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            b_half = add_bias(b_left if i_half == 0 else b_right, bias_ptr, o_col, N)
            m_out = (o_row < M)[:, None] & (o_col < N)[None, :]
            tl.store(p_row + o_col[None, :], b_half.to(out_ptr.dtype.element_ty), mask=m_out)


PATCH_TILE = Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, programs=1)
"""The fastest of nine tiles (TUNING.md)."""


def fused_is_faster(pixel_values: Tensor, weight: Tensor) -> bool:
    """Return whether `_embed_patches` beats a reordering pass and cuBLAS, given a new order but no learned positions.

    Its tiles are large, so the last wave decides: a threshold on wave efficiency (TUNING.md).
    """
    n_tiles = triton.cdiv(len(pixel_values), PATCH_TILE.block_m) * triton.cdiv(len(weight), PATCH_TILE.block_n)
    tma_readable = pixel_values.dtype == weight.dtype and uses_tma(pixel_values, weight)
    threshold = tuning(capability(weight.device)[0]).patch_wave_efficiency
    return tma_readable and wave_efficiency(n_tiles, weight, PATCH_TILE.programs) >= threshold


def embed_and_reorder(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    restore_index: Tensor,
    merge_unit: int,
    tile: Tile = PATCH_TILE,
) -> Tensor:
    """Return `pixel_values @ weight.T + bias`, `[S, C]`, with tokens in the tower's order. TMA reads both operands."""
    (M, K), N = pixel_values.shape, weight.shape[0]
    out = weight.new_empty((M, N))
    if M == 0:
        return out
    pixels = TensorDescriptor.from_tensor(pixel_values, [tile.block_m, tile.block_k])
    weights = TensorDescriptor.from_tensor(weight[None, None], [1, 1, tile.block_n, tile.block_k])
    n_tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    with torch.cuda.device_of(out):  # Triton launches on the current device, which need not be the tensor's
        _embed_patches[(min(n_tiles, tile.programs * multiprocessors(out.device)),)](
            pixels, weights, bias, restore_index, out, M,
            MERGE_UNIT=merge_unit, N=N, K=K, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            BAND=tile.band, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _convert_and_reorder(
    pixel_values: Tensor, restore_index: Tensor | None, merge_unit: int, dtype: torch.dtype
) -> Tensor:
    """Return `[S, K]` pixel values in another dtype and order.

    Rows start at multiples of 128 bytes, a cache line. Nothing reads the padding between them.
    """
    S, K = pixel_values.shape
    elements_per_line = 128 // dtype.itemsize
    rows = pixel_values.new_empty((S, triton.cdiv(K, elements_per_line) * elements_per_line), dtype=dtype)
    config = row_config(K, has_residual=False)
    if S:
        with torch.cuda.device_of(rows):
            _convert_rows[(S,)](
                pixel_values, restore_index, rows, rows.stride(0), MERGE_UNIT=merge_unit, K=K, MAIN=config.main,
                TAIL=config.tail, num_warps=PASS_WARPS,
            )  # fmt: skip
    return rows[:, :K]


def _launch_add_positions(
    y: Tensor,
    x: Tensor | None,
    table: Tensor,
    taps: Tensor,
    tap_weights: Tensor,
    bias: Tensor | None,
    restore_index: Tensor | None,
    merge_unit: int,
) -> Tensor:
    """Write positions, plus x and bias if there are any, to `y` `[S, C]`, and return it."""
    S, C = y.shape
    config = row_config(C, has_residual=x is not None)
    if S:
        with torch.cuda.device_of(y):
            _add_position_rows[(S,)](
                x, table, taps, tap_weights, bias, restore_index, y, MERGE_UNIT=merge_unit, C=C, MAIN=config.main,
                TAIL=config.tail, num_warps=PASS_WARPS,
            )  # fmt: skip
    return y


def interpolate_positions(table: Tensor, taps: Tensor, tap_weights: Tensor) -> Tensor:
    """Return the learned positions of patches; see `qwenvit.ops.interpolate_positions`.

    I/O: reads table, taps and tap_weights, writes y. 8 FLOPs an element.
    """
    y = table.new_empty((taps.shape[0], table.shape[1]))
    return _launch_add_positions(y, None, table, taps, tap_weights, None, None, 1)


def add_positions(
    x: Tensor, table: Tensor, taps: Tensor, tap_weights: Tensor, restore_index: Tensor | None, merge_unit: int
) -> Tensor:
    """Return patches plus their learned positions; see `qwenvit.ops.add_positions`.

    I/O: reads x, table, taps and tap_weights, writes y. 9 FLOPs an element.
    """
    return _launch_add_positions(torch.empty_like(x), x, table, taps, tap_weights, None, restore_index, merge_unit)


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
    """Return embedded patches; see `qwenvit.ops.patch_embed`.

    I/O: reads pixel_values, weight and table, writes y. Writes and reads once more: learned positions, converted rows,
    and rows to reorder unless `fused_is_faster`. 2·S·K·N FLOPs.
    """
    rows = pixel_values
    if table is None and restore_index is not None and fused_is_faster(rows, weight):
        return embed_and_reorder(rows, weight, bias, restore_index, merge_unit)
    if rows.dtype != weight.dtype or restore_index is not None:
        rows = _convert_and_reorder(rows, restore_index, merge_unit, weight.dtype)
    if table is None or taps is None or tap_weights is None:
        return F.linear(rows, weight, bias)
    y = weight.new_empty((len(rows), len(weight)))
    _launch_add_positions(y, None, table, taps, tap_weights, bias, restore_index, merge_unit)
    return y.addmm_(rows, weight.T)


interpolate_positions_op = register(
    "interpolate_positions(Tensor table, Tensor taps, Tensor tap_weights) -> Tensor",
    interpolate_positions,
    lambda table, taps, *_: table.new_empty((taps.shape[0], table.shape[1])),
)
add_positions_op = register(
    "add_positions(Tensor x, Tensor table, Tensor taps, Tensor tap_weights, Tensor? restore_index, int merge_unit) "
    "-> Tensor",
    add_positions,
    lambda x, *_: torch.empty_like(x),
)
patch_embed_op = register(
    "patch_embed(Tensor pixel_values, Tensor weight, Tensor? bias, Tensor? table, Tensor? taps, Tensor? tap_weights, "
    "Tensor? restore_index, int merge_unit) -> Tensor",
    patch_embed,
    lambda pixel_values, weight, *_: weight.new_empty((pixel_values.shape[0], weight.shape[0])),
)
