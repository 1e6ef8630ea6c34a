"""What the matrix products with fused epilogues share: tile sizes, order of tiles, main loop, store.

Each is `x @ weight.T` by programs that stay resident and walk over the output's tiles, two programs of 4 warps a
multiprocessor, so that one's epilogue runs under the other's main loop. The loops over tiles and over K are
flattened, so that loads of the next tile start under the epilogue too. From sm_90 operands come through TMA
descriptors, before that through pointers. The kernels themselves lie in `qkv_rope.py` and `mlp.py`.

Times here and there: one H200, bf16, medians of CUDA graphs over rotating buffers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenvit.kernels.device import capability, multiprocessors

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
    """Row and column of a tile. Tiles go down bands of BAND rows, so that a wave shares rows and columns in L2."""
    i_band = i_tile // (BAND * N_COL_TILES)
    n_rows = tl.minimum(n_row_tiles - i_band * BAND, BAND)
    i_within = i_tile - i_band * (BAND * N_COL_TILES)
    return i_band * BAND + i_within % n_rows, i_within // n_rows


@triton.jit
def accumulate(
    x_ptr,  # shape (M, K): a TMA descriptor with blocks (BLOCK_M, BLOCK_K), or a pointer
    w_ptr,  # shape (N, K): a TMA descriptor of 4 dimensions, the last of them K, or a pointer
    i_row,  # first row of x
    i_head,  # first block row of the weight in its descriptor's three leading dimensions
    i_group,
    i_col,
    o_w,  # the same rows of the weight as numbers below N, shape (BLOCK_N,)
    M,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """fp32 sums of one tile. What stands in rows past M is not to be stored."""
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if TMA:
        for i_k in range(0, K, BLOCK_K):
            b_x = x_ptr.load([i_row, i_k])
            b_w = w_ptr.load([i_head, i_group, i_col, i_k]).reshape(BLOCK_N, BLOCK_K)
            b_sum = tl.dot(b_x, b_w.T, b_sum, input_precision="ieee")
    else:
        o_k = tl.arange(0, BLOCK_K)
        o_x = tl.minimum(i_row + tl.arange(0, BLOCK_M), M - 1)
        p_x = x_ptr + o_x.to(tl.int64)[:, None] * K + o_k
        p_w = w_ptr + o_w.to(tl.int64)[None, :] * K + o_k[:, None]
        for i_k in range(0, K, BLOCK_K):
            m_k = o_k < K - i_k
            b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
            b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
            b_sum = tl.dot(b_x, b_w, b_sum, input_precision="ieee")
            p_x += BLOCK_K
            p_w += BLOCK_K
    return b_sum


@triton.jit
def split_halves(b_tile):
    """The left and the right columns of a tile: both lie in each thread's registers, so nothing moves."""
    n_rows: tl.constexpr = b_tile.shape[0]
    n_cols: tl.constexpr = b_tile.shape[1]
    return b_tile.reshape(n_rows, 2, n_cols // 2).permute(0, 2, 1).split()


@triton.jit
def add_bias(
    b_tile,
    bias_ptr,  # shape (N,), or None
    o_col,  # columns of the tile, shape (b_tile.shape[1],)
    N: tl.constexpr,
):
    """The tile, plus the bias of its columns if there is one."""
    if bias_ptr is not None:
        b_tile += tl.load(bias_ptr + o_col, mask=o_col < N, other=0.0).to(tl.float32)[None, :]
    return b_tile


@triton.jit
def store_tile(
    out_ptr,  # shape (M, N)
    b_tile,
    o_row,  # rows of the tile, shape (b_tile.shape[0],)
    o_col,  # its columns, shape (b_tile.shape[1],)
    M,
    N: tl.constexpr,
):
    """Write what lies inside the output."""
    p_out = out_ptr + o_row.to(tl.int64)[:, None] * N + o_col[None, :]
    tl.store(p_out, b_tile.to(out_ptr.dtype.element_ty), mask=(o_row < M)[:, None] & (o_col < N)[None, :])


@dataclass(frozen=True)
class Tile:
    """Sizes of one launch; `programs` stay resident on each multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int
    band: int = 8


TMA_TILE = Tile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=3, programs=2)
"""QKV with rotation, N = 3840, K = 1280, at M = 4096 and 9216: 65.5 and 142.8 µs; cuBLAS' product alone 59.3 and 127.3.
What is left is how full the rounds are: at M = 4096 ours are 91 % full, cuBLAS' (192 × 128) 97 %, and the tensor cores
are busy for 66 and 76 % of the time. The epilogue itself takes up to 10 %.

Slower, over N = 3840 to 3072 and M = 4096 to 16384: 8 warps, by 3 to 5 %; 128 × 256 by one program of 8 warps, 3 to 14;
128 × 192 as 128 + 64, 17 to 44; 64 × 128, 23 to 38; BLOCK_K 32 in 6 stages, 25; a program to a tile, or loops that are
not flattened, up to 16, with the angles loaded before the main loop or after; stores by TMA, up to 11. Letting the two
programs start apart changes nothing. Bands of 4, 8, 16, 32 rows differ by 2 % at 4096; at 9216 they took 142.9, 144.0,
145.3, 149.5. (Of several runs, which differ by up to 2 %.)"""
POINTER_TILE = Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4, programs=2)
"""48 KiB of shared memory and 161 registers on sm_80, where TMA_TILE would take all 255."""


def uses_tma(*matrices: Tensor) -> bool:
    """Whether descriptors can read these: the GPU has TMA, and rows start at multiples of 16 bytes."""
    return capability(matrices[0].device) >= (9, 0) and all(
        matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0 for matrix in matrices
    )


def wave_efficiency(n_tiles: int, x: Tensor, programs: int = TMA_TILE.programs) -> float:
    """How full the rounds of tiles are, `programs` to a multiprocessor; 0 where cuBLAS is always the better choice.

    That is in fp32, without tensor cores, and on GPUs other than sm_90, for which these kernels are shaped.
    """
    if x.dtype == torch.float32 or capability(x.device)[0] != 9 or n_tiles == 0:
        return 0.0
    programs *= multiprocessors(x.device)
    return n_tiles / (triton.cdiv(n_tiles, programs) * programs)


def descriptor_of(tensor: Tensor, shape: list[int], block: list[int]) -> TensorDescriptor:
    """Descriptor of a contiguous tensor seen in another shape."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        strides[i - 1] = strides[i] * shape[i]
    return TensorDescriptor(tensor, shape, strides, block)
