"""Options of the compiler that every launch gives explicitly, because Triton's defaults change."""

from typing import Any

COMPILE_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""A product and the sum it enters are contracted to one FMA, which changes bits. Triton's default is an environment
variable, TRITON_DEFAULT_FP_FUSION: on where it is not set, with a warning since 3.9, and off from 3.10 on."""
