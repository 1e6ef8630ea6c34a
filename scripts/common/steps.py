"""Run the steps of a benchmark of one model, so that one that fails costs none of the others."""

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from common.progress import progress

Step = Callable[[str], AbstractContextManager[None]]
"""Surrounds one step, given its name."""


class ParityError(Exception):
    """Results differ that must not: no time is reported."""


def raise_on(failures: list[str]) -> None:
    """Raise ParityError with the failures, if there are any."""
    if failures:
        raise ParityError("; ".join(failures))


def steps_of(result: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> Step:
    """Return the context manager of a step: it shows progress, times the step and saves all figures so far.

    Args:
        result: figures of a model. `model` is its name; a step that fails is added to `failed` with the reason, and
            every step's time to `seconds`.
        save: called with the result after each step.
    """

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        progress(f"{result['model']}: {name}")
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001 (the report lists it, and the next steps run)
            progress("")
            traceback.print_exc()
            result["failed"].append((name, first_line(error)))
        result["seconds"][name] = round(time.perf_counter() - start, 1)
        save(result)
        gc.collect()
        with contextlib.suppress(RuntimeError):  # after a CUDA error, this fails as well
            torch.cuda.empty_cache()

    return step


def failures(result: dict[str, Any]) -> list[str]:
    """Return a line for each reason, with the steps that failed: after a CUDA error, all later steps fail alike."""
    groups: dict[str, list[str]] = {}
    for step, why in result["failed"]:
        groups.setdefault(why, []).append(step)
    return [f"{', '.join(steps)}: {why}" for why, steps in groups.items()]


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
