"""Arguments that many functions share, such as `impl`, `device` and `dtype`: accepted values and checks."""

from collections.abc import Iterable
from operator import index
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Impl = Literal["auto", "triton", "reference"]
DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""Names of the torch dtypes a tower computes in."""


def check_device(device: "torch.device | str | None") -> "torch.device":
    """Return `device` as a torch device; None means the current GPU if there is one, else the CPU.

    Raises:
        ValueError: torch does not know the device, or cannot allocate a tensor on it.
    """
    import torch  # not at the top: the command line needs this module's names and must start without torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:  # every type torch raises here
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise ValueError(f"device: {str(device)!r} cannot be used on this machine: {reason}") from error
    return found


def check_dtype(dtype: "torch.dtype | str | None", device: "torch.device") -> "torch.dtype | None":
    """Return `dtype` as a torch dtype, or None for `"auto"`, which means the checkpoint's own dtype.

    A `dtype` of None means bfloat16 on a GPU and float32 elsewhere.

    Raises:
        ValueError: not one of `DTYPE_NAMES`, their torch dtypes, `"auto"` and None.
    """
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype == "auto":
        return None
    dtypes = {name: getattr(torch, name) for name in DTYPE_NAMES}
    found = dtypes.get(dtype) if isinstance(dtype, str) else dtype
    if found not in dtypes.values():
        raise ValueError(f"dtype: expected one of {[*DTYPE_NAMES, 'auto']} or the torch dtype, got {dtype!r}")
    return found


def check_integers(name: str, values: Iterable[int], expected: str) -> tuple[int, ...]:
    """Return integers in their order: of a sequence, an array or a generator; Python's, numpy's or torch's.

    Raises:
        TypeError: anything else; the message says what was `expected`.
    """
    try:
        if isinstance(values, set | frozenset | dict):
            raise TypeError("no order")
        found = list(values)
        if any(isinstance(value, bool) for value in found):
            raise TypeError("booleans")
        return tuple(map(index, found))
    except TypeError as error:
        raise TypeError(f"{name}: expected {expected}, got {values!r}") from error


def check_indices(name: str, values: Iterable[int], count: int) -> tuple[int, ...]:
    """Return indices of `count` things, counted from 0; negative ones count from the end.

    Raises:
        TypeError: no integers in an order.
        ValueError: none, or one that is out of range.
    """
    chosen = check_integers(name, values, "a sequence of integers")
    if not chosen or not all(-count <= one < count for one in chosen):
        raise ValueError(f"{name}: expected at least one, from {-count} to {count - 1}, got {list(chosen)}")
    return tuple(one % count for one in chosen)
