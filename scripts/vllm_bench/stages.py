"""The stages of a request, and how each is timed."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from common.timing import synchronize

PROCESSOR, ENCODER_STEP, TOWER = "processor", "encoder step", "tower"
TEXT, EXECUTE, WHOLE = "text forward", "execute_model", "whole request"
STAGES = (PROCESSOR, ENCODER_STEP, TOWER, TEXT, EXECUTE, WHOLE)
"""In the order of tables. The text and the encoder step are in `execute_model`, the tower and a copy in the latter."""


def timed(method: Callable[..., Any], stage: str, times: dict[str, float]) -> Callable[..., Any]:
    """Return a method that adds its wall seconds to `times[stage]`; it waits for the GPU before and after."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        out = method(*args, **kwargs)
        synchronize()
        times[stage] = times.get(stage, 0.0) + time.perf_counter() - start
        return out

    return run
