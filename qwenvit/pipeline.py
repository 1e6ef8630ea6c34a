"""Prepared images through the tower, batch by batch, while later images are still being prepared.

On a GPU, images are copied on one stream and run on another, so that copies, the tower and whatever the caller
does with the results overlap. The next batch is queued before the caller gets the results of a batch.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from qwenvit.busy_clock import BusyClock
from qwenvit.plan.inputs import CheckedGrid, WritePixels, check_grid
from qwenvit.preprocess.batching import BYTES_PER_BATCH, batches
from qwenvit.preprocess.prefetch import WAITING, Prefetched, prefetch
from qwenvit.preprocess.prepared import Prepared

BATCHES_IN_FLIGHT = 2
"""Batches that the GPU has not finished: one that runs, and one that it finds queued when it is done."""

Item = TypeVar("Item")
RunTower = Callable[[WritePixels, CheckedGrid], Sequence[Tensor]]
"""Runs the tower on a batch, and returns what is wanted of it: tensors of which each item has some rows."""
OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class BatchOutput:
    """What `run_batches` yields of a batch."""

    tensors: Sequence[Tensor]
    """What the tower gave, and nothing of images that failed."""
    grid: Tensor
    """`[items, 3]` int64 on the CPU: frame groups, rows and columns of patches of each image that did not fail."""
    skipped: list[int]
    """The positions in the batch of images that failed."""
    errors: dict[int, Exception]
    """Why they failed, by position."""

    def __len__(self) -> int:
        """The images of the batch, failed ones included."""
        return len(self.grid) + len(self.skipped)


def check_on_error(on_error: OnError) -> None:
    """Raise ValueError unless `on_error` is a known choice."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")


def handle_errors(
    images: Iterable[Prefetched[Prepared]], on_error: OnError | Literal["keep"]
) -> Iterator[Prefetched[Prepared]]:
    """Raise the error of the first image that failed, or warn of each, or keep them without a warning.

    What is no fault of an image is raised in any case.
    """
    for image in images:
        if image.error is not None:
            if on_error == "raise" or not isinstance(image.error, OSError | TypeError | ValueError):
                try:
                    raise image.error
                finally:  # else the error refers to itself, and images stay until Python looks for cycles
                    del image
            if on_error == "skip":
                # Without a registry, Python shows the same warning again in a later call.
                warnings.warn_explicit(f"skipped {image.error}", UserWarning, __file__, 1, registry={})
        yield image


def prefetch_on_stream(
    device: torch.device, items: Iterable[Item], prepare: Callable[[int, Item], Prepared], num_workers: int
) -> Generator[Prefetched[Prepared]]:
    """Prepare items in threads; what that does to tensors on the GPU follows the caller's own work on them."""
    if device.type != "cuda":
        return prefetch(items, prepare, num_workers, lambda one: one.num_bytes)

    def prepare_on_stream(index: int, item: tuple[torch.cuda.Stream, Item]) -> Prepared:
        with torch.cuda.stream(item[0]):
            return prepare(index, item[1])

    with_streams = ((torch.cuda.current_stream(device), item) for item in items)
    return prefetch(with_streams, prepare_on_stream, num_workers, lambda one: one.num_bytes)


def run_batches(
    images: Iterable[Prefetched[Prepared]],
    run: RunTower,
    device: torch.device,
    spatial_merge_size: int,
    empty: Sequence[Tensor],
    max_patches: int,
    may_split: bool,
    clock: BusyClock | None = None,
) -> Iterator[BatchOutput]:
    """Yield what a tower computes of images, a batch at a time, in order.

    If `images` raises an exception, the output of all images before it is yielded first.

    Args:
        images: drawn one at a time.
        run: runs the tower on a batch.
        device: the tower's device.
        spatial_merge_size: of the tower.
        empty: what `run` would return of no image.
        max_patches: most patches of a batch.
        may_split: whether an item's bits are the same in every batch. Then images do not wait in a batch, or their
            output on the GPU, for an image from a slow source.
        clock: measures how long the device works.

    Raises:
        ValueError: the current stream is being captured in a CUDA graph.
        OverflowError: the output exceeds the range of float16.
    """
    streams = None
    clock = clock or BusyClock(measures=False)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("encode has streams and graphs of its own: capture enc.tower(pixel_values, plan) in yours")
        streams = _streams(device)
    failed: list[Exception] = []  # popped when it is raised: this frame, in its traceback, must not refer to it

    def uploaded() -> Iterator[Prefetched[Prepared]]:
        try:
            for image in images:
                if image is WAITING:
                    if may_split:
                        yield image
                else:
                    yield _upload(image, device, streams)
                del image  # an error's traceback has this frame, and would keep the image before it
        except Exception as error:  # noqa: BLE001 raised below, after the images before it
            failed.append(error)

    launched: deque[tuple[BatchOutput, torch.cuda.Event | None]] = deque()
    unfinished: deque[torch.cuda.Event] = deque()
    for batch in batches(uploaded(), max_patches, BYTES_PER_BATCH):
        if has_images := bool(batch):
            if len(unfinished) == BATCHES_IN_FLIGHT:
                unfinished.popleft().synchronize()
            launched.append(_launch(batch, run, spatial_merge_size, empty, streams, clock))
            if (done := launched[-1][1]) is not None:
                unfinished.append(done)
        del batch  # its frames would stay in memory while the next are collected
        while launched and (not has_images or streams is None or len(launched) == BATCHES_IN_FLIGHT):
            yield _hand_over(*launched.popleft())
    while launched:
        yield _hand_over(*launched.popleft())
    if failed:
        raise failed.pop()


def items_of(batches: Generator[Iterable[Item]]) -> Iterator[Item]:
    """Yield the items of all batches, one after another."""
    with closing(batches):
        for batch in batches:
            yield from batch


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Return the streams on which images are copied to a GPU and run: torch keeps memory for each stream."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


Streams = tuple[torch.cuda.Stream, torch.cuda.Stream] | None


def _upload(image: Prefetched[Prepared], device: torch.device, streams: Streams) -> Prefetched[Prepared]:
    if image.result is None or streams is None:
        return image
    with torch.cuda.stream(streams[0]):
        return image._replace(result=image.result.to(device))


def _launch(
    batch: list[Prefetched[Prepared]],
    run: RunTower,
    spatial_merge_size: int,
    empty: Sequence[Tensor],
    streams: Streams,
    clock: BusyClock,
) -> tuple[BatchOutput, torch.cuda.Event | None]:
    """Queue a batch, and return its output and the event after which that is there."""
    prepared = [image.result for image in batch if image.result is not None]
    skipped = [position for position, image in enumerate(batch) if image.result is None]
    errors = {position: image.error for position, image in enumerate(batch) if image.error is not None}
    if not prepared:
        return BatchOutput(empty, torch.empty(0, 3, dtype=torch.int64, device="cpu"), skipped, errors), None
    grid = check_grid([one.grid for one in prepared], spatial_merge_size)
    patches = [math.prod(one.grid) for one in prepared]

    def write(pixel_values: Tensor) -> None:
        for one, rows in zip(prepared, pixel_values.split(patches), strict=True):
            one.write(rows)

    done = None
    with torch.no_grad():
        if streams is None:
            with clock.on_host():
                tensors = run(write, grid)
        else:
            copies, compute = streams
            compute.wait_stream(copies)
            compute.wait_stream(torch.cuda.current_stream(compute.device))  # the caller's tensors and weights
            with torch.cuda.stream(compute), clock.on_stream(compute):
                tensors = run(write, grid)
            for one in prepared:
                one.record_stream(compute)
            done = compute.record_event(torch.cuda.Event(blocking=True))
    return BatchOutput(tensors, grid.tensor, skipped, errors), done


def _hand_over(output: BatchOutput, done: torch.cuda.Event | None) -> BatchOutput:
    """Let the caller's stream wait for the output."""
    if done is not None:
        stream = torch.cuda.current_stream(output.tensors[0].device)
        stream.wait_event(done)
        for tensor in output.tensors:
            tensor.record_stream(stream)
    _refuse_overflow(output.tensors)
    return output


def _refuse_overflow(tensors: Iterable[Tensor]) -> None:
    """Raise OverflowError if features in float16 are infinite or NaN."""
    if not all(tensor.dtype != torch.float16 or tensor.isfinite().all() for tensor in tensors):
        raise OverflowError("the features exceed the range of float16 (65504): use bfloat16 or float32")
