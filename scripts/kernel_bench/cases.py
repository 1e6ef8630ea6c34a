"""What one benchmark case is: its inputs, implementations, fp64 truth, work in bytes and FLOPs, and targets."""

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

from common.kernel_inputs import Inputs
from common.machine import Ceilings
from qwenvit import kernels

DTYPE = torch.bfloat16
ELEMENT_BYTES = 2
"""Bytes of one bf16 element."""
IMAGE_SIDES = (448, 672, 896, 1344)
"""Sides of the benchmarked square images, in pixels."""
PATCH_COUNTS = (1024, 4096, 9216)
"""Rows of the passes over memory: the patches of 448², 896² and 1344² images with patches of 14 pixels."""

FOR_USERS = ("qwenvit", "dispatch")
"""Names of the implementation of a case that `qwenvit.ops` runs; a case has one of them."""

MakeInputs = Callable[[torch.device, torch.dtype], Inputs]


@dataclass(frozen=True)
class Implementation:
    """One way to do the work of a case."""

    call: Callable[[Inputs], Any]
    to_comparable: Callable[[Any], Tensor] = lambda out: out
    """Convert the result to the truth's layout. Only the comparison runs it; it is never timed."""


@dataclass(frozen=True)
class Measurement:
    """Seconds a call of each implementation of a case, and what the machine can do at most."""

    seconds: Mapping[str, float]
    ceilings: Ceilings
    minimum_bytes: int

    @property
    def copy_seconds(self) -> float:
        """Seconds that the minimum bytes take at the copy bandwidth."""
        return self.minimum_bytes / self.ceilings.copy_bandwidth

    def speedup(self, implementation: str, *rivals: str) -> float:
        """Return how many times faster `implementation` is than the fastest of the rivals that ran."""
        return min(self.seconds[name] for name in rivals if name in self.seconds) / self.seconds[implementation]


@dataclass(frozen=True)
class Target:
    """A metric and its limit. The report says whether it is met."""

    text: str
    """What the metric says, such as `over cuDNN`."""
    metric: Callable[[Measurement], float]
    limit: float
    at_most: bool = False
    """Whether the limit is an upper one."""
    any_kernel: bool = False
    """Whether a library's kernel may meet the target; otherwise only kernels of `qwenvit.kernels` may."""
    unit: str = "×"

    def evaluate(self, measurement: Measurement, launched: list[str]) -> tuple[float, bool]:
        """Return the metric, and whether it meets the limit with the kernels that were launched."""
        value = self.metric(measurement)
        allowed = self.any_kernel or (bool(launched) and own_kernels().issuperset(launched))
        return value, allowed and (value <= self.limit if self.at_most else value >= self.limit)


@dataclass(frozen=True)
class Case:
    """One operation at one shape. The report has one row for each of `implementations`."""

    section: str
    series: str
    """Label of the case's bars in the chart."""
    title: str
    tokens: int
    head_dim: int | None
    make_inputs: MakeInputs
    """Return new random inputs. Tensors of a grid plan are copied, so that two sets share no memory."""
    implementations: Mapping[str, Implementation]
    """qwenvit's own."""
    rivals: Mapping[str, Implementation]
    """What others offer for the same work."""
    truth: Callable[[Inputs], Tensor]
    """Return the result in fp64."""
    baseline: Implementation
    """The plain torch sequence. Its error limits the others' errors; it is timed only where it is a rival too."""
    minimum_bytes: int
    """Bytes moved when each input is read once and each output written once."""
    flops: int
    pass_bytes: Mapping[str, int] = field(default_factory=dict)
    """Further bytes that a separate pass moves, by the name of its kernel. They count only if that kernel ran."""
    targets: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)
    """By the name of one of `implementations`."""
    lower_bounds: Mapping[str, Implementation] = field(default_factory=dict)
    """Parts of the work, timed to show how little time the whole could take."""


def kernel_modules() -> list[ModuleType]:
    """Import and return every module of `qwenvit.kernels`."""
    return [
        importlib.import_module(info.name) for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    ]


@functools.cache
def own_kernels() -> frozenset[str]:
    """Return the names of the kernels in `qwenvit.kernels`."""
    return frozenset(
        name for module in kernel_modules() for name, x in vars(module).items() if isinstance(x, KernelInterface)
    )


COPY_BOUND = "copy of as many bytes"


def add_copy_bound(case: Case) -> Case:
    """Add a device copy that moves the case's minimum bytes to its lower bounds.

    A short copy does not reach the bandwidth of a large one, which the targets ask for. This shows the difference.
    """

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        # Elements of 16 bytes: torch copies an odd number of bytes one by one, at half the bandwidth.
        source = torch.randint(2**62, (case.minimum_bytes // 32, 2), device=device)
        return {**case.make_inputs(device, dtype), "copy_source": source}

    copy = Implementation(lambda x: x["copy_source"].clone())
    return replace(case, make_inputs=make_inputs, lower_bounds={**case.lower_bounds, COPY_BOUND: copy})


def relative_error(out: Tensor, truth: Tensor) -> float:
    """Return the relative L2 error; NaN if either tensor has a NaN."""
    return float((out.double() - truth).norm() / truth.norm())


def to_fp64(inputs: Inputs) -> Inputs:
    """Convert the floating-point tensors to fp64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw from the standard normal distribution in fp32 and convert to `dtype`."""
    return torch.randn(shape, device=device).to(dtype)


def hidden_states(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return random hidden states `[rows, columns]` with a few channels 100 times larger, as in real towers."""
    x = torch.randn(rows, columns, device=device)
    x[:, :: max(columns // 3, 1)] *= 100
    return x.to(dtype)


def linear_weight(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a random weight `[rows, columns]`, smaller at the outlier channels of `hidden_states`.

    Products of both are of the order of 1.
    """
    weight = torch.randn(rows, columns, device=device) * columns**-0.5
    weight[:, :: max(columns // 3, 1)] *= 0.01
    return weight.to(dtype)
