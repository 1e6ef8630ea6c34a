"""The parity gate: measure the difference between two towers, and decide whether it is rounding or a mistake.

In fp32, two correct towers agree to about 1e-6 relative L2; every realistic mistake (RoPE missing in one block, a
window layer at the wrong index, a softmax scale 2 % off) exceeds 1e-4. In 16 bits rounding hides such mistakes, so the
rule there bounds our error against the fp32 truth by `ERROR_FACTOR` times the other tower's, the baseline error.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

FP32_BOUND = 1e-5
"""Largest relative L2 between two correct towers in IEEE fp32 at full depth."""
ERROR_FACTOR = 1.05
"""Largest ratio of our 16-bit error to the baseline error, both against the fp32 truth."""
MEANINGFUL_ERROR = 0.05
"""Above this relative L2, the output of a 16-bit tower is mostly amplified rounding: do not compare such outputs."""

T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """Distance of a tensor from the one that it should equal."""

    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float

    @classmethod
    def of(cls, actual: Tensor, expected: Tensor) -> "Difference":
        """Measure in fp64. A NaN in either tensor makes every figure NaN, which passes no bound.

        Raises:
            ValueError: the shapes differ.
        """
        if actual.shape != expected.shape:
            raise ValueError(f"actual: expected shape {list(expected.shape)}, got {list(actual.shape)}")
        a, b = actual.double().flatten(), expected.double().flatten()
        error = (a - b).abs()
        norms = a.norm() * b.norm()
        return cls(
            float(error.max()),
            float(error.mean()),
            float(error.norm() / b.norm()) if b.any() else float(error.norm()),
            float(a @ b / norms) if norms else float("nan"),
        )


@dataclass(frozen=True)
class Check:
    """One check of the gate: a figure and the largest value that passes."""

    name: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the figure is within its bound; NaN is not."""
        return self.value <= self.bound


def exact(name: str, actual: Tensor, expected: Tensor) -> Check:
    """Check bitwise equality: the rule for the reference tower and the pinned transformers on a CPU.

    Raises:
        ValueError: the dtypes or shapes differ.
    """
    if actual.dtype != expected.dtype:
        raise ValueError(f"actual: expected dtype {expected.dtype}, got {actual.dtype}")
    return Check(f"{name}: max_abs", Difference.of(actual, expected).max_abs, 0.0)


def close(name: str, actual: Tensor, truth: Tensor) -> Check:
    """Check that two fp32 towers agree to `FP32_BOUND`."""
    return Check(f"{name}: relative L2 in fp32", Difference.of(actual, truth).relative_l2, FP32_BOUND)


def no_worse(name: str, actual: Tensor, other: Tensor, truth: Tensor) -> Check:
    """Check that our 16-bit error is at most `ERROR_FACTOR` times the baseline error.

    Args:
        name: what the tensors are, for the check's name.
        actual: our tensor.
        other: the other tower's tensor, whose error is the baseline error.
        truth: the fp32 tower's tensor.
    """
    ours, theirs = (Difference.of(tensor, truth).relative_l2 for tensor in (actual, other))
    if theirs == 0:
        return Check(f"{name}: error", ours, 0.0)
    return Check(f"{name}: error / transformers' error", ours / theirs, ERROR_FACTOR)


@dataclass(frozen=True)
class BlockCall:
    """One call of a block."""

    x: Tensor
    """The hidden states that the block was called with."""
    args: tuple[Any, ...]
    """The other positional arguments."""
    kwargs: dict[str, Any]
    """The other keyword arguments."""
    out: Tensor
    """The hidden states that the block returned."""


def record(blocks: Iterable[nn.Module], run: Callable[[], T]) -> tuple[T, list[BlockCall]]:
    """Call `run` and record every call of the blocks. Inputs and outputs are copied, since blocks may work in place.

    Returns:
        What `run` returned, and the calls in the order in which they ended.
    """
    calls: list[BlockCall] = []
    inputs: list[Tensor] = []

    def record_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).clone())

    def record_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(BlockCall(inputs.pop(), args[1:], others, (out[0] if isinstance(out, tuple) else out).clone()))

    handles = []
    for block in blocks:
        handles += [
            block.register_forward_pre_hook(record_input, with_kwargs=True),
            block.register_forward_hook(record_call, with_kwargs=True),
        ]
    try:
        return run(), calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def replay(block: nn.Module, call: BlockCall, x: Tensor) -> Tensor:
    """Repeat a recorded call of a block on another input, cast to the dtype of the recorded one."""
    out = block(x.to(call.x.dtype, copy=True), *call.args, **call.kwargs)
    return out[0] if isinstance(out, tuple) else out


def blocks_no_worse(
    ours: tuple[nn.ModuleList, list[BlockCall]],
    others: tuple[nn.ModuleList, list[BlockCall]],
    true_calls: list[BlockCall],
) -> list[Check]:
    """Check each block of a 16-bit tower with `no_worse`, on the input that the fp32 tower's block was called with.

    Args:
        ours: our blocks and their recorded calls.
        others: the other tower's blocks and their recorded calls.
        true_calls: the recorded calls of the fp32 tower's blocks.
    """
    checks = []
    for index, truth in enumerate(true_calls):
        actual, other = (replay(blocks[index], calls[index], truth.x) for blocks, calls in (ours, others))
        checks.append(no_worse(f"block {index}", actual, other, truth.out))
    return checks
