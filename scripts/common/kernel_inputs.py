"""What a benchmarked kernel and its rivals receive."""

from torch import Tensor

Inputs = dict[str, Tensor]
"""Tensors by the name of the argument."""
