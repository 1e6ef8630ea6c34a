"""Records of images through an encoder in batches; where a batch needs too much memory, one by one."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import chain
from typing import Any, TypeVar

import torch

from qwenvit.datasets.record import Record
from qwenvit.encoder import Encoder
from qwenvit.item_stream import EncodedBatch, encode_stream

Result = TypeVar("Result")

TOO_MUCH = (torch.OutOfMemoryError, MemoryError, OverflowError)
"""What one image of a batch may do to the whole batch."""


def embed_in_batches(
    encoder: Encoder,
    records: Iterator[Record],
    convert: Callable[[EncodedBatch[Record]], Result],
    embed_alone: Callable[[Record], Result],
    **stream: Any,
) -> Generator[Result]:
    """Yield what `convert` makes of each batch, and after an error of a whole batch, `embed_alone` of those waiting.

    Args:
        encoder: the encoder.
        records: drawn in this thread, some ahead. An exception of theirs is raised in its turn.
        convert: called when a batch is done; it may need too much memory too.
        embed_alone: must not raise errors of the record.
        stream: arguments of `encode_stream`.
    """
    # An image's bits must not depend on where a run was interrupted. On a CPU, a batch of one is as fast as any.
    max_patches = 1 if encoder.device.type == "cpu" else None
    pending: deque[Record] = deque()

    def drawn(first: Record) -> Iterator[Record]:
        for record in chain([first], records):
            pending.append(record)
            yield record

    for first in records:  # once, unless a batch needs too much memory
        too_much = False
        batches = encode_stream(encoder, drawn(first), Record.open, max_patches=max_patches, **stream)
        with closing(batches):
            try:
                for batch in batches:
                    result = convert(batch)
                    for _ in batch.items:
                        pending.popleft()
                    del batch
                    yield result
            except TOO_MUCH:
                too_much = True
        del batches
        if too_much:  # no longer in the except block: the error's frames would keep the batch on the device
            if encoder.device.type == "cuda":
                torch.cuda.empty_cache()
            while pending:  # which of them is too much?
                yield embed_alone(pending.popleft())
