"""Register launchers with torch, so that `torch.compile` treats each as one operation and does not trace into it."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("qwenvit", "FRAGMENT")


def register(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Define `qwenvit::<name>` and return its overload.

    Args:
        schema: in torch's schema language, `name(Tensor x, …) -> Tensor`.
        launcher: the implementation for CUDA tensors and, in Triton's interpreter, CPU tensors.
        fake: the implementation for `torch.compile`, which allocates outputs of the right shape and dtype.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, launcher, device)
    torch.library.register_fake(f"qwenvit::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.qwenvit, name).default
