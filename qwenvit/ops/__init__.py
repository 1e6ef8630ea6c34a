"""The one door to the kernels: each operation here runs in Triton or as its reference, with the same meaning.

`impl="auto"` chooses by the tensors' device alone: Triton on a CUDA device, the reference elsewhere. An explicit
choice never falls back. (Triton's interpreter, `TRITON_INTERPRET=1`, runs `impl="triton"` on CPU tensors.) Kernels are
imported where they are called: triton is there on Linux alone, and slow to import.
"""

from qwenvit.ops.attention import rope_attention
from qwenvit.ops.merging import merge_norm, spatial_merge
from qwenvit.ops.mlp import activation_, linear_act, swiglu, swiglu_pass
from qwenvit.ops.mrope import rope_index
from qwenvit.ops.norms import add_norm, add_norm_, norm
from qwenvit.ops.patches import add_positions, interpolate_positions, patch_embed
from qwenvit.ops.plan import grid_plan
from qwenvit.ops.projections import qkv_rope, rotate_qk_

__all__ = [
    "activation_",
    "add_norm",
    "add_norm_",
    "add_positions",
    "grid_plan",
    "interpolate_positions",
    "linear_act",
    "merge_norm",
    "norm",
    "patch_embed",
    "qkv_rope",
    "rope_attention",
    "rope_index",
    "rotate_qk_",
    "spatial_merge",
    "swiglu",
    "swiglu_pass",
]
