"""Weights in the layout the kernels want: the public name of `qwenvit.ops.packing`."""

from qwenvit.ops.packing import LANES, adjacent_pairs, pack_gate_up, pack_qkv, pad_columns

__all__ = ["LANES", "adjacent_pairs", "pack_gate_up", "pack_qkv", "pad_columns"]
