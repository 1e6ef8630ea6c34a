"""One vector for each item of a packed batch, of which every bit depends on the item alone.

torch's own reductions, `index_add_` and matrix products order their sums by the size of the batch, or by chance.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

PoolMode = Literal["mean", "patches"]
CHUNK_ROWS = 64
"""Rows that one thread adds: a large image must not wait for one thread."""


def check_pool_mode(mode: str) -> None:
    """Raise ValueError unless `mode` is a known way to pool."""
    if mode not in ("mean", "patches"):
        raise ValueError(f"mode: expected 'mean' or 'patches', got {mode!r}")


@torch.no_grad()
def mean_of_items(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the mean of the rows of each item, summed in float32.

    Args:
        rows: `[rows, width]`, floating, items one after another.
        sizes: the rows of each item, at least one.

    Returns:
        `[items, width]` float32.
    """
    counts = _to_device(torch.tensor(sizes, dtype=torch.float32, device="cpu"), rows.device)
    return _sums(rows.float(), sizes) / counts[:, None]


@torch.no_grad()
def normalized(vectors: Tensor) -> Tensor:
    """Return vectors `[items, width]` float32 with a length of 1; one of zeros stays."""
    lengths = _sums(vectors.square().T.contiguous(), [vectors.shape[1]])[0].sqrt()
    return vectors / lengths.clamp(min=torch.finfo(torch.float32).tiny)[:, None]


def _sums(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Add the rows of each segment: those of each chunk in order, then the chunks."""
    if not sizes:
        return rows.new_zeros(0, rows.shape[1])
    chunks = [[CHUNK_ROWS] * (size // CHUNK_ROWS) + [size % CHUNK_ROWS] * (size % CHUNK_ROWS > 0) for size in sizes]
    of_chunks = [length for lengths in chunks for length in lengths]
    return _segment_sums(_segment_sums(rows, of_chunks), [len(lengths) for lengths in chunks])


def _segment_sums(rows: Tensor, lengths: list[int]) -> Tensor:
    on_device = _to_device(torch.tensor(lengths, dtype=torch.int64, device="cpu"), rows.device)
    return torch.segment_reduce(rows, "sum", lengths=on_device, axis=0, unsafe=True)  # unsafe: no check on the host


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU without waiting for the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
