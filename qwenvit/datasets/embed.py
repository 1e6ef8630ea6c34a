"""Records through an encoder: a batch at a time, with the reason of each record that fails."""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qwenvit.busy_clock import BusyClock
from qwenvit.datasets.image_batches import TOO_MUCH, embed_in_batches
from qwenvit.datasets.item import EncodedItem
from qwenvit.datasets.options import JobOptions
from qwenvit.datasets.progress import ItemReport
from qwenvit.datasets.record import Record
from qwenvit.datasets.shard_stream import CopiedBatch
from qwenvit.encoder import Encoder
from qwenvit.item_stream import EncodedBatch, encode_stream
from qwenvit.outputs import Embeddings

OF_THE_ITEM = (*TOO_MUCH, OSError, TypeError, ValueError)


@dataclass(frozen=True)
class Outcome:
    """What became of the records of a batch."""

    batch: CopiedBatch
    reports: list[ItemReport]


def embed_records(
    encoder: Encoder, records: Iterable[Record], options: JobOptions, clock: BusyClock
) -> Generator[Outcome]:
    """Yield the outcome of each batch, in order.

    An exception of `records` is raised in its turn, after the outcomes of those before it.

    Args:
        encoder: the encoder.
        records: drawn in this thread, some ahead.
        options: the job's.
        clock: adds up how long the device works.
    """
    stream: dict[str, Any] = {"keep_patches": options.pool == "patches", "clock": clock}
    stream |= {"num_workers": options.num_workers, "decode": options.decode, **options.image}
    for is_video, group in groupby(records, key=lambda record: record.is_video):
        if is_video:
            for record in group:
                yield _one(record, options, lambda record=record: _embed_video(encoder, record, options))  # type: ignore[misc]
        else:
            yield from _embed_images(encoder, group, options, stream)


def _embed_images(
    encoder: Encoder, records: Iterator[Record], options: JobOptions, stream: dict[str, Any]
) -> Iterator[Outcome]:
    def convert(batch: EncodedBatch[Record]) -> Outcome:
        return copy_batch(batch.items, batch.embeddings, options)

    def embed_alone(record: Record) -> Outcome:
        return _one(record, options, lambda: _embed_alone(encoder, record, stream))

    return embed_in_batches(encoder, records, convert, embed_alone, **stream)


def _embed_alone(encoder: Encoder, record: Record, stream: dict[str, Any]) -> Embeddings:
    with closing(encode_stream(encoder, [record], Record.open, **(stream | {"num_workers": 0}))) as batches:
        return next(batches).embeddings


def _embed_video(encoder: Encoder, record: Record, options: JobOptions) -> Embeddings:
    path = record.open()
    if isinstance(path, bytes):
        raise ValueError("expected a video in a file of its own, got one in an archive or a table")
    names = ("min_pixels", "max_pixels", "size")
    bounds: dict[str, Any] = {name: options.image.get(name) for name in names}
    keep_patches = options.pool == "patches"
    return encoder.encode_video(path, num_workers=options.num_workers, keep_patches=keep_patches, **bounds)


def _one(record: Record, options: JobOptions, embed: Callable[[], Embeddings]) -> Outcome:
    try:
        return copy_batch([record], embed(), options)
    except OF_THE_ITEM as error:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return Outcome(CopiedBatch([], None), [failed(record, error)])


def failed(record: Record, error: Exception) -> ItemReport:
    """Return the report of a record that failed."""
    return ItemReport(record.id, (0, 0, 0), 0, " ".join(str(error).split()) or type(error).__name__)


def copy_batch(records: list[Record], embeddings: Embeddings, options: JobOptions) -> Outcome:
    """Pool a batch on its device, and begin to copy what the output has of it to pinned memory."""
    items: list[EncodedItem] = []
    reports: list[ItemReport] = []
    pooled = None
    if options.pool is not None and len(embeddings.grid_thw):
        pooled = _start_copy(embeddings.pooled(options.pool, normalize=options.normalize))
    layers = [_start_copy(layer) for layer in (embeddings.packed, *embeddings.deepstack)] if options.tokens else []
    first, row = 0, 0
    for position, (record, item) in enumerate(zip(records, embeddings, strict=True)):
        if (error := embeddings.errors.get(position)) is not None:
            reports.append(failed(record, error))
            continue
        size = len(item.tokens)
        tokens, deepstack = None, []
        if layers:
            tokens, *deepstack = (layer[first : first + size] for layer in layers)
        vector = None if pooled is None else pooled[row]
        items.append(EncodedItem(record, item.grid, size, tokens, deepstack, vector, item.is_video, item.times))
        reports.append(ItemReport(record.id, item.grid, size, None))
        first, row = first + size, row + 1
    copied = None
    if items and embeddings.packed.is_cuda:
        copied = torch.cuda.current_stream(embeddings.packed.device).record_event(torch.cuda.Event(blocking=True))
    return Outcome(CopiedBatch(items, copied), reports)


def _start_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor on a GPU to pinned memory without waiting for it."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
