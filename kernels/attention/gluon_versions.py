"""Gluon's functions that versions of Triton name differently, under the names of the newest version."""

from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.9 renamed both.
reinterpret = getattr(shared_memory_descriptor, "reinterpret", None) or shared_memory_descriptor._reinterpret
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
