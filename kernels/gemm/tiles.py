"""What the matrix products with fused epilogues share: tile sizes, order of tiles, main loop, store.

Each computes `x @ weight.T`. Two persistent programs of 4 warps on a multiprocessor loop over the output's tiles, so
one program's epilogue overlaps the other's main loop. The loops over tiles and over K are flattened, so loads of the
next tile overlap the epilogue too. Operands are read through TMA descriptors from sm_90 on, through pointers before.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.device import capability

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    raise ImportError(f"fused matrix products need triton 3.4 or later, got {triton.__version__}") from error


@triton.jit
def tile_at(
    i_tile,
    n_row_tiles,
    N_COL_TILES: tl.constexpr,
    BAND: tl.constexpr,
):
    """Return row and column of a tile.

    Consecutive tiles go down the columns of bands of BAND rows of tiles, so that a wave's tiles share operands in L2
    (GROUP_SIZE_M in Triton's tutorial).
    """
    i_band = i_tile // (BAND * N_COL_TILES)
    n_rows = tl.minimum(n_row_tiles - i_band * BAND, BAND)
    i_within = i_tile - i_band * (BAND * N_COL_TILES)
    return i_band * BAND + i_within % n_rows, i_within // n_rows


@triton.jit
def accumulate(
    x_ptr,  # shape (M, K): a TMA descriptor with blocks (BLOCK_M, BLOCK_K), or a pointer
    w_ptr,  # shape (N, K): a TMA descriptor of 4 dimensions whose last is K, or a pointer
    i_row,  # first row of x
    i_w0,  # first index in each of the weight descriptor's three leading dimensions
    i_w1,
    i_w2,
    o_w,  # rows of the weight, below N, shape (BLOCK_N,); read through a pointer
    M,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """Return one tile of x · wᵀ in fp32. Rows past M are undefined; the caller must not store them."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for i_k in range(0, K, BLOCK_K):
            b_x = x_ptr.load([i_row, i_k])
            b_w = w_ptr.load([i_w0, i_w1, i_w2, i_k]).reshape(BLOCK_N, BLOCK_K)
            b_acc = tl.dot(b_x, b_w.T, b_acc, input_precision="ieee")
    else:
        o_k = tl.arange(0, BLOCK_K)
        o_x = tl.minimum(i_row + tl.arange(0, BLOCK_M), M - 1)
        p_x = x_ptr + o_x.to(tl.int64)[:, None] * K + o_k
        p_w = w_ptr + o_w.to(tl.int64)[None, :] * K + o_k[:, None]
        for i_k in range(0, K, BLOCK_K):
            m_k = o_k < K - i_k
            b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
            b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
            p_x += BLOCK_K
            p_w += BLOCK_K
    return b_acc


@triton.jit
def split_halves(b_tile):
    """Return the left and right halves of a tile's columns. Each thread has both, so no data moves."""
    n_rows: tl.constexpr = b_tile.shape[0]
    n_cols: tl.constexpr = b_tile.shape[1]
    return b_tile.reshape(n_rows, 2, n_cols // 2).permute(0, 2, 1).split()


@triton.jit
def add_bias(
    b_tile,
    bias_ptr,  # shape (N,), or None
    o_col,  # output columns of the tile, shape (b_tile.shape[1],)
    N: tl.constexpr,
):
    """Return the tile plus the bias of its columns, if there is one."""
    if bias_ptr is not None:
        b_tile += tl.load(bias_ptr + o_col, mask=o_col < N, other=0.0).to(tl.float32)[None, :]
    return b_tile


@triton.jit
def store_tile(
    out_ptr,  # shape (M, N)
    b_tile,
    o_row,  # output rows of the tile, shape (b_tile.shape[0],)
    o_col,  # output columns of the tile, shape (b_tile.shape[1],)
    M,
    N: tl.constexpr,
):
    """Store the part of a tile that is inside the output."""
    p_out = out_ptr + o_row.to(tl.int64)[:, None] * N + o_col[None, :]
    tl.store(p_out, b_tile.to(out_ptr.dtype.element_ty), mask=(o_row < M)[:, None] & (o_col < N)[None, :])


@dataclass(frozen=True)
class Tile:
    """Launch config of a persistent matrix product: `programs` run on each multiprocessor; `band`: see `tile_at`."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int
    band: int = 8


TMA_TILE = Tile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3, programs=2)
"""The fastest for the published towers on sm_90 (TUNING.md)."""
POINTER_TILE = Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4, programs=2)
"""For GPUs without TMA, where TMA_TILE would need every register of a thread (TUNING.md)."""


def uses_tma(*matrices: Tensor) -> bool:
    """Return whether TMA descriptors can read matrices: the GPU has TMA, and rows start at multiples of 16 bytes."""
    return capability(matrices[0].device) >= (9, 0) and all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0 for matrix in matrices
    )


def can_beat_cublas(weight: Tensor) -> bool:
    """Return whether a fused product may be faster than cuBLAS and a pass.

    It never is in fp32, which uses no tensor cores, nor on GPUs other than sm_90, which these kernels were tuned for.
    """
    return weight.dtype != torch.float32 and capability(weight.device)[0] == 9


def make_descriptor(tensor: Tensor, shape: list[int], block: list[int]) -> TensorDescriptor:
    """Return the TMA descriptor of a contiguous tensor viewed in another shape, read in blocks of shape `block`."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return TensorDescriptor(tensor, shape, strides, block)
