"""How far one tower's numbers are from another's, and the rule that says when that is right.

The rule in full precision: two right towers agree in fp32 to about 1e-6 relative L2, while every realistic mistake
(a rotation missing in one block, a window layer misplaced, a softmax scale 2 % off) is above 1e-4. In 16 bits such
mistakes hide in rounding, so there the error against the fp32 truth may not exceed the other tower's own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

FP32_BOUND = 1e-5
"""Largest relative L2 between two right towers in IEEE fp32 at full depth."""
ERROR_FACTOR = 1.05
"""Largest ratio of our 16-bit error to the other tower's, both against the fp32 truth."""
MEANINGFUL_ERROR = 0.05
"""Beyond this relative L2 a 16-bit tower's output is mostly amplified rounding, and comparing ends says nothing."""

T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """Distance of a tensor from the one it should equal."""

    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float

    @classmethod
    def of(cls, actual: Tensor, expected: Tensor) -> "Difference":
        """Measure in fp64; NaN anywhere makes every figure NaN, which passes no bound.

        Raises:
            ValueError: the shapes differ.
        """
        if actual.shape != expected.shape:
            raise ValueError(f"actual: expected shape {list(expected.shape)}, got {list(actual.shape)}")
        a, b = actual.double().flatten(), expected.double().flatten()
        gap = (a - b).abs()
        norms = a.norm() * b.norm()
        return cls(
            float(gap.max()),
            float(gap.mean()),
            float(gap.norm() / b.norm()) if b.any() else float(gap.norm()),
            float(a @ b / norms) if norms else float("nan"),
        )


@dataclass(frozen=True)
class Check:
    """One line of the gate: a figure and the bound it must keep."""

    name: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the figure keeps its bound; NaN does not."""
        return self.value <= self.bound


def exact(name: str, actual: Tensor, expected: Tensor) -> Check:
    """Not a bit of difference: what the reference tower owes the pinned transformers on a CPU."""
    if actual.dtype != expected.dtype:
        raise ValueError(f"actual: expected dtype {expected.dtype}, got {actual.dtype}")
    return Check(f"{name}: max_abs", Difference.of(actual, expected).max_abs, 0.0)


def close(name: str, actual: Tensor, truth: Tensor) -> Check:
    """Agreement of two fp32 towers."""
    return Check(f"{name}: relative L2 in fp32", Difference.of(actual, truth).relative_l2, FP32_BOUND)


def no_worse(name: str, actual: Tensor, other: Tensor, truth: Tensor) -> Check:
    """Our 16-bit error, as a multiple of the other tower's."""
    ours, theirs = (Difference.of(tensor, truth).relative_l2 for tensor in (actual, other))
    if theirs == 0:
        return Check(f"{name}: error", ours, 0.0)
    return Check(f"{name}: error / transformers' error", ours / theirs, ERROR_FACTOR)


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: its input, whatever else it was given, and its output."""

    x: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor


def record(blocks: Iterable[nn.Module], run: Callable[[], T]) -> tuple[T, list[BlockCall]]:
    """Run something and note what each block was given and returned, copied: blocks may work in place."""
    calls: list[BlockCall] = []
    given: list[Tensor] = []

    def note_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args[0] if args else kwargs["hidden_states"]).clone())

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(BlockCall(given.pop(), args[1:], named, (out[0] if isinstance(out, tuple) else out).clone()))

    handles = []
    for block in blocks:
        handles += [
            block.register_forward_pre_hook(note_input, with_kwargs=True),
            block.register_forward_hook(note, with_kwargs=True),
        ]
    try:
        return run(), calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def replay(block: nn.Module, call: BlockCall, x: Tensor) -> Tensor:
    """Call a block as it was called before, on another input (cast to the dtype it had then)."""
    out = block(x.to(call.x.dtype, copy=True), *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


def blocks_no_worse(
    ours: tuple[nn.ModuleList, list[BlockCall]],
    others: tuple[nn.ModuleList, list[BlockCall]],
    true_calls: list[BlockCall],
) -> list[Check]:
    """Each block of two 16-bit towers, fed the fp32 truth's own input, against the truth's output.

    Args:
        ours: our blocks, and how they were called.
        others: the other tower's.
        true_calls: how the fp32 tower's blocks were called.
    """
    checks = []
    for index, truth in enumerate(true_calls):
        actual, other = (replay(blocks[index], calls[index], truth.x) for blocks, calls in (ours, others))
        checks.append(no_worse(f"block {index}", actual, other, truth.out))
    return checks
