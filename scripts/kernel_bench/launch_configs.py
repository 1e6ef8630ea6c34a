"""A launch config in `kernels/`: how a candidate takes its place, and how its line of source is written."""

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from kernel_bench.cases import kernel_modules
from kernel_bench.timing import Inputs
from qwenvit import kernels


@dataclass(frozen=True)
class Shape:
    """Something to run on which a launch config has influence."""

    title: str
    inputs: Callable[[torch.device, torch.dtype], Inputs]
    call: Callable[[Inputs], Any]


@dataclass(frozen=True)
class Knob:
    """A launch config: a constant of a module in `qwenvit.kernels`, or a function there that chooses one."""

    module: str
    name: str
    candidates: tuple[Any, ...]
    """Values; or, as dicts, what to change in the value there is now."""
    shapes: tuple[Shape, ...]

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
def configured(knob: Knob, candidate: Any) -> Iterator[list[Any]]:
    """Put a candidate in the place of the config, in every module that imported it; None leaves it, and looks.

    Yields:
        A list that the configs in use are added to.
    """
    current, seen = knob.current, []

    def value(now: Any) -> Any:
        new = now if candidate is None else candidate
        seen.append(dataclasses.replace(now, **new) if isinstance(new, dict) else new)
        return seen[-1]

    new = (lambda *args, **options: value(current(*args, **options))) if knob.is_function else value(current)
    with contextlib.ExitStack() as stack:
        for module in kernel_modules():
            if getattr(module, knob.name, None) is current:
                stack.enter_context(mock.patch.object(module, knob.name, new))
        yield seen


def spelled(config: Any) -> str:
    """As the source has it: fields by name, defaults left out."""
    if not dataclasses.is_dataclass(config):
        return repr(config)
    fields = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
    given = [f"{field.name}={value!r}" for field, value in fields if value != field.default]
    return f"{type(config).__name__}({', '.join(given)})"


def rewritten(source: str, name: str, config: Any) -> str:
    """The source with the one line that sets a constant changed; ValueError unless there is exactly one."""
    line = re.compile(rf"^{name} = .*$", re.MULTILINE)
    if len(line.findall(source)) != 1:
        raise ValueError(f"{name}: expected one line that sets it")
    return line.sub(lambda _: f"{name} = {spelled(config)}", source)


def full(config: Any, candidate: Any) -> Any:
    """The config that a candidate means, where it is given as changes."""
    return dataclasses.replace(config, **candidate) if isinstance(candidate, dict) else candidate
