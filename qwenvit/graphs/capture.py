"""Capturing work in a CUDA graph, while the GPU and other threads go on."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture the current stream's work in a graph.

    `torch.cuda.graph` also waits for the GPU and empties torch's caches; here the GPU works on, and its next batches
    find the memory they had. In relaxed mode, kernels that no pass has needed yet may be compiled during the capture.
    """
    graph.capture_begin(pool=pool, capture_error_mode="relaxed")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # it says that the capture is invalid; the reason is the error to raise
            graph.capture_end()
        raise
    graph.capture_end()


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause Python's collector of cycles: CUDA aborts a capture during which it frees another CUDA graph."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
