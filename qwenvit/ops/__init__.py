"""The checked entry points to the kernels: each operation runs in Triton or in plain torch, with the same meaning.

Every operation checks its arguments and then dispatches on `impl`: `"triton"` runs the Triton kernel (on CPU tensors
only in Triton's interpreter, `TRITON_INTERPRET=1`), `"reference"` runs `qwenvit.ops.reference`, and `"auto"` means
`"triton"` for tensors on a CUDA device and `"reference"` elsewhere. An explicit choice never falls back. The Triton
kernels compute no gradients: with `requires_grad` tensors and gradients enabled, `"triton"` raises ValueError.

Kernels are imported when they are first called: triton exists on Linux only and takes long to import.
"""

from qwenvit.ops.attention import rope_attention
from qwenvit.ops.cloning import clone_rows
from qwenvit.ops.merging import merge_norm, spatial_merge
from qwenvit.ops.mlp import activation_, linear_act, swiglu, swiglu_pass
from qwenvit.ops.mrope import rope_index
from qwenvit.ops.norms import add_norm, add_norm_, norm
from qwenvit.ops.patches import add_positions, interpolate_positions, patch_embed
from qwenvit.ops.plan import grid_plan
from qwenvit.ops.projections import add_linear_, linear, qkv_rope, rotate_qk_
from qwenvit.ops.resize import resize_patches

__all__ = [
    "activation_",
    "add_linear_",
    "add_norm",
    "add_norm_",
    "add_positions",
    "clone_rows",
    "grid_plan",
    "interpolate_positions",
    "linear",
    "linear_act",
    "merge_norm",
    "norm",
    "patch_embed",
    "qkv_rope",
    "resize_patches",
    "rope_attention",
    "rope_index",
    "rotate_qk_",
    "spatial_merge",
    "swiglu",
    "swiglu_pass",
]
