"""Registers launchers with torch, so that `torch.compile` and CUDA graphs see each as one operation."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("qwenvit", "FRAGMENT")


def register(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define `qwenvit::<name>` and return its overload.

    Args:
        schema: in torch's schema language, `name(Tensor x, …) -> Tensor`.
        launcher: what the operation runs, on CUDA tensors and, for Triton's interpreter, on CPU tensors.
        fake: what it returns in shape and dtype, for `torch.compile`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, launcher, device)
    torch.library.register_fake(f"qwenvit::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.qwenvit, name).default
