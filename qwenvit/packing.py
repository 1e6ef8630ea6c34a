"""Weight layouts of the kernels: the public path of `qwenvit.ops.packing`."""

from qwenvit.ops.packing import WIDTH_MULTIPLE, adjacent_pairs, pack_gate_up, pack_qkv, pad_columns

__all__ = ["WIDTH_MULTIPLE", "adjacent_pairs", "pack_gate_up", "pack_qkv", "pad_columns"]
