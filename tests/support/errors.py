"""Errors of tensors against fp64, and how large they may be."""

import torch


def error(got, expected):
    """Return the relative L2 error; NaN if either tensor has one, 0 for empty tensors."""
    return ((got.double() - expected).norm() / expected.norm()).item() if expected.numel() else 0.0


def error_bound(unfused, expected):
    """Return 1.05 times the error of plain torch, in fp32 at least one unit in the last place.

    In fp32 sums have the same products, rounded in another order: among few outputs chance decides who is nearer.
    """
    smallest = torch.finfo(torch.float32).eps if unfused.dtype == torch.float32 else 0
    return max(1.05 * error(unfused, expected), smallest)
