"""Launch settings of `qwenvit.kernels`: try a candidate in place of the one in use, and rewrite its line of source."""

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from common.kernel_inputs import Inputs
from kernel_bench.cases import MakeInputs, kernel_modules
from qwenvit import kernels


@dataclass(frozen=True)
class Workload:
    """A call, at one shape, that a launch setting influences."""

    title: str
    make_inputs: MakeInputs
    call: Callable[[Inputs], Any]


@dataclass(frozen=True)
class Tunable:
    """A launch setting: a constant of a module of `qwenvit.kernels`, or a function there that chooses by shape."""

    module: str
    """Relative to `qwenvit.kernels`."""
    name: str
    candidates: tuple[Any, ...]
    """Values; or dicts of the fields to change in the dataclass in use."""
    workloads: tuple[Workload, ...]

    @property
    def title(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def current(self) -> Any:
        return getattr(importlib.import_module(f"{kernels.__name__}.{self.module}"), self.name)

    @property
    def is_function(self) -> bool:
        return callable(self.current)


@contextlib.contextmanager
def override(tunable: Tunable, candidate: Any) -> Iterator[list[Any]]:
    """Use a candidate in every module that imported the setting. None keeps the current setting and only records it.

    Yields:
        A list to which each value is appended as it is set, or chosen by a call.
    """
    current, used = tunable.current, []

    def choose(now: Any) -> Any:
        used.append(now if candidate is None else apply_changes(now, candidate))
        return used[-1]

    if tunable.is_function:
        replacement = lambda *args, **options: choose(current(*args, **options))  # noqa: E731
    else:
        replacement = choose(current)
    with contextlib.ExitStack() as stack:
        for module in kernel_modules():
            if getattr(module, tunable.name, None) is current:
                stack.enter_context(mock.patch.object(module, tunable.name, replacement))
        yield used


def apply_changes(config: Any, candidate: Any) -> Any:
    """Return the candidate; if it is a dict, return `config` with these fields changed."""
    return dataclasses.replace(config, **candidate) if isinstance(candidate, dict) else candidate


def format_config(config: Any) -> str:
    """Write a config as Python source: fields by name, without those that have their default."""
    if not dataclasses.is_dataclass(config):
        return repr(config)
    fields = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
    arguments = [f"{field.name}={value!r}" for field, value in fields if value != field.default]
    return f"{type(config).__name__}({', '.join(arguments)})"


def replace_constant(source: str, name: str, config: Any) -> str:
    """Return the source with another value for a constant.

    Raises:
        ValueError: not exactly one line sets the constant.
    """
    line = re.compile(rf"^{name} = .*$", re.MULTILINE)
    if len(line.findall(source)) != 1:
        raise ValueError(f"{name}: expected one line that sets it, got {len(line.findall(source))}")
    return line.sub(lambda _: f"{name} = {format_config(config)}", source)
