"""Matrix products by cuBLAS whose rows have, in 16 bits, the same bits whatever the number of rows.

For few rows cuBLAS splits K (split-K), and so adds the terms of a sum in another order. It does not from `MIN_ROWS`
rows on, in 16 bits and the products of the published towers, on an H200 (TUNING.md). So fewer rows are padded: a row of
a product depends on its own row of the input alone, and the added rows are dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 320
"""Rows from which on cuBLAS adds in the same order, whatever their number (TUNING.md)."""


def _pad_rows(x: Tensor) -> Tensor:
    """Append arbitrary rows to `x` `[S, C]`, up to `MIN_ROWS`; return `x` itself if it has as many.

    The distance between rows, which cuBLAS's choice may depend on, stays the same.
    """
    if len(x) >= MIN_ROWS:
        return x
    S, C = x.shape
    padded = x.new_empty((MIN_ROWS, max(x.stride(0), C)))[:, :C]
    padded[:S] = x
    return padded


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias`, `[S, C]` -> `[S, N]`; see `qwenvit.ops.linear`."""
    return F.linear(_pad_rows(x), weight, bias)[: len(x)]


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU's tanh approximation of `linear`, computed in cuBLASLt's epilogue, on a GPU."""
    return torch._addmm_activation(bias, _pad_rows(x), weight.T, use_gelu=True)[: len(x)]


def add_linear_(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add `x @ weight.T` to `total` `[S, N]` in place, and return it; see `qwenvit.ops.add_linear_`."""
    if len(x) >= MIN_ROWS:
        return total.addmm_(x, weight.T)
    return total.copy_(_pad_rows(total).addmm_(_pad_rows(x), weight.T)[: len(x)])
