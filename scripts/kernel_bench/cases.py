"""What a case of `bench_kernels.py` is: inputs, contenders, truth, the work to be done, and bars."""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.runtime import KernelInterface

from common.machine import Ceilings
from kernel_bench.timing import Inputs
from qwenvit import kernels

DTYPE = torch.bfloat16
ITEM = 2
"""Bytes of an element: everything here is bf16."""
SIDES = (448, 672, 896, 1344)
"""Pixels along the sides of the square images whose tables are given."""
TOKENS = (1024, 4096, 9216)
"""Rows of the passes over memory: the patches of 448², 896² and 1344² at patch 14."""


@dataclass(frozen=True)
class Run:
    """One way to do the work of a case."""

    call: Callable[[Inputs], Any]
    finish: Callable[[Any], Tensor] = lambda out: out
    """What it returns, as the truth has it; for the comparison alone."""


@dataclass(frozen=True)
class Figures:
    """What was measured of a case."""

    seconds: Mapping[str, float]
    ceilings: Ceilings
    fewest_bytes: int

    @property
    def one_pass(self) -> float:
        """Seconds that the fewest bytes take at the rate of a copy."""
        return self.fewest_bytes / self.ceilings.copy

    def over(self, ours: str, *rivals: str) -> float:
        """How many times faster than the best of these."""
        return min(self.seconds[name] for name in rivals if name in self.seconds) / self.seconds[ours]


@dataclass(frozen=True)
class Bar:
    """A figure and the limit it is held to; reported as met or not."""

    text: str
    """What is measured, as `over cuDNN`."""
    value: Callable[[Figures], float]
    limit: float
    at_most: bool = False
    any_kernel: bool = False
    """Whether a library's kernel may meet it."""
    unit: str = "×"

    def verdict(self, figures: Figures, ran: list[str]) -> tuple[float, bool]:
        """The value, and whether it reaches the limit, by a kernel of ours."""
        value = self.value(figures)
        own = self.any_kernel or (bool(ran) and own_kernels().issuperset(ran))
        return value, own and (value <= self.limit if self.at_most else value >= self.limit)


@dataclass(frozen=True)
class Case:
    """One row of a table, or one for each of `ours`."""

    section: str
    series: str
    """The bars of one colour in the chart."""
    title: str
    tokens: int
    head_dim: int | None
    inputs: Callable[[torch.device, torch.dtype], Inputs]
    """New random inputs; of the plan too, so that sets share nothing."""
    ours: Mapping[str, Run]
    rivals: Mapping[str, Run]
    truth: Callable[[Inputs], Tensor]
    """In fp64."""
    stick: Run
    """The plain torch sequence, whose error is the measure; not timed unless it is a rival too."""
    fewest_bytes: int
    """Each input read once, each output written once."""
    flops: int
    pass_bytes: Mapping[str, int] = field(default_factory=dict)
    """What separate passes move besides, by the kernels' names; counted where they ran (see `qwenvit.ops`)."""
    bars: Mapping[str, tuple[Bar, ...]] = field(default_factory=dict)
    """For each of `ours`."""
    floors: Mapping[str, Run] = field(default_factory=dict)
    """Timed for comparison, but no rivals: they do a part of the work."""


def kernel_modules() -> list[ModuleType]:
    """Every module of `qwenvit.kernels`."""
    return [
        importlib.import_module(info.name) for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    ]


@functools.cache
def own_kernels() -> frozenset[str]:
    """Names of the kernels in `qwenvit.kernels`."""
    return frozenset(
        name for module in kernel_modules() for name, x in vars(module).items() if isinstance(x, KernelInterface)
    )


COPY = "copy of as many bytes"


def with_copy(case: Case) -> Case:
    """The case with one more floor: a device copy that reads and writes as many bytes, in graphs like the rest.

    Short copies do not reach the rate of a large one, which the bars ask for; this says how much of that is anyone's.
    """

    def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        # In whole 16 bytes: torch copies an odd number of bytes one by one, at half the rate.
        half = torch.randint(2**62, (case.fewest_bytes // 32, 2), device=device)
        return {**case.inputs(device, dtype), "copied": half}

    return replace(case, inputs=inputs, floors={**case.floors, COPY: Run(lambda x: x["copied"].clone())})


def relative_error(out: Tensor, truth: Tensor) -> float:
    """Relative L2; not a number where anything is not."""
    return float((out.double() - truth).norm() / truth.norm())


def doubles(inputs: Inputs) -> Inputs:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def hidden_states(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """As real towers have them: a few channels are 100 times larger than the rest."""
    x = torch.randn(rows, columns, device=device)
    x[:, :: max(columns // 3, 1)] *= 100
    return x.to(dtype)


def linear_weight(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Read the large channels with small weights, so that outputs are of the order of 1."""
    weight = torch.randn(rows, columns, device=device) * columns**-0.5
    weight[:, :: max(columns // 3, 1)] *= 0.01
    return weight.to(dtype)
