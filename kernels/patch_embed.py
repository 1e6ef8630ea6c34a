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

PASS_WARPS = 1
"""Adding positions takes 7.6 µs in one warp a row and 8.5 in two at 4096 x 1152, 15.8 and 16.5 at 9216 (H200, bf16)."""


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
    stride_weight,  # between rows; for a pointer alone
    UNIT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    n_across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    n_tiles = tl.cdiv(S, BLOCK_S) * n_across
    o_k = tl.arange(0, BLOCK_K)
    for i_tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=TMA):
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
        o_n = i_n + tl.arange(0, BLOCK_N)
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


@dataclass(frozen=True)
class GemmConfig:
    """The fused GEMM's tile, and how many programs share the tiles (0: one program a tile)."""

    block_s: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    programs: int = 0


IEEE = GemmConfig(64, 128, 16, num_warps=4, num_stages=3)
"""626 µs at S = 4096, K = 1176, N = 1280 on an H200, where five other tiles took 702 to 926 and cuBLAS 322."""


def fused_config(S: int, pixel_values: Tensor, weight: Tensor, learned: bool, reorder: bool) -> GemmConfig | None:
    """The fused GEMM's tile; None where passes around a cuBLAS GEMM are faster."""
    if weight.dtype == torch.float32:  # cuBLAS may use TF32 there, by a switch that is not ours
        return IEEE
    # With learned positions, cuBLAS onto the interpolated positions takes 46 µs at S = 7056 on an H200, this kernel's
    # best tile 52. Rows to be converted would have to pass through registers: 67 µs and more, against 64 for `_stage`
    # and cuBLAS (S = 9216). Without positions and order, cuBLAS is the whole of it.
    if learned or not reorder or pixel_values.dtype != weight.dtype or not weight.is_cuda:
        return None
    # 128 bytes of a row that starts within a line cost two lines: with weights not padded to whole lines this kernel
    # takes 54 µs, with padded ones 45 (S = 9216, K = 1176, order left as it is).
    if weight.stride(0) * weight.itemsize % 128 or pixel_values.stride(0) * pixel_values.itemsize % 16:
        return None
    if (pixel_values.data_ptr() | weight.data_ptr()) % 16:  # a descriptor cannot start there
        return None
    device = torch.cuda.get_device_properties(weight.device)
    if device.major != 9:
        return None
    # Tiles are large, so the last wave decides: 0.82 of the time of a pass and cuBLAS at S = 9216 (waves 91 % full) and
    # 16384 (97 %), 0.99 at 2304 (68 %), but 1.18 at 4096 (61 %) and 1.6 at 1024 (30 %).
    tiles, programs = triton.cdiv(S, 128) * triton.cdiv(weight.shape[0], 256), device.multi_processor_count
    if 3 * tiles < 2 * programs * triton.cdiv(tiles, programs):
        return None
    return GemmConfig(128, 256, 64, num_warps=8, num_stages=4, tma=True, programs=programs)


def _launch_fused(
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
    (S, K), N = pixel_values.shape, weight.shape[0]
    y = weight.new_empty((S, N))
    if not S:
        return y
    tiles = triton.cdiv(S, config.block_s) * triton.cdiv(N, config.block_n)
    pixel, weights = pixel_values, weight
    if config.tma:
        pixel = TensorDescriptor.from_tensor(pixel_values, [config.block_s, config.block_k])
        weights = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
    with torch.cuda.device_of(y):  # Triton launches on the current device, which need not be the tensor's
        _fused[(min(tiles, config.programs or tiles),)](
            pixel, weights, bias, table, taps, tap_weights, restore_index, y, S, weight.stride(0), UNIT=merge_unit,
            N=N, K=K, BLOCK_S=config.block_s, BLOCK_N=config.block_n, BLOCK_K=config.block_k, TMA=config.tma,
            num_warps=config.num_warps, num_stages=config.num_stages,
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
                TAIL=config.tail, num_warps=PASS_WARPS,
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
                TAIL=config.tail, num_warps=PASS_WARPS,
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
    and read once more, and so are positions. 2·S·K·N FLOPs.
    """
    S = pixel_values.shape[0]
    config = fused_config(S, pixel_values, weight, table is not None, restore_index is not None)
    if config is not None:
        positions = (table, taps, tap_weights)
        return _launch_fused(config, pixel_values, weight, bias, *positions, restore_index, merge_unit)
    rows = pixel_values
    if rows.dtype != weight.dtype or restore_index is not None:
        rows = _stage_rows(rows, restore_index, merge_unit, weight.dtype)
    if table is None or taps is None or tap_weights is None:
        return F.linear(rows, weight, bias)
    y = weight.new_empty((S, weight.shape[0]))
    return _write_positions(y, None, table, taps, tap_weights, bias, restore_index, merge_unit).addmm_(rows, weight.T)


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
