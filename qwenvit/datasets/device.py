"""One device's part of a job: records in, shards out."""

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import torch

from qwenvit.busy_clock import BusyClock
from qwenvit.datasets.embed import embed_records
from qwenvit.datasets.item import ShardLayout
from qwenvit.datasets.ledger import Encoded
from qwenvit.datasets.options import JobOptions
from qwenvit.datasets.record import Record
from qwenvit.datasets.shard_folder import ShardReport
from qwenvit.datasets.shard_stream import ShardStream
from qwenvit.encoder import Encoder


def load_encoder(options: JobOptions, device: torch.device | str | None) -> Encoder:
    """Return the encoder of a job; `Encoder.from_pretrained` says what it raises."""
    if isinstance(options.model, Encoder):
        return options.model
    return Encoder.from_pretrained(options.model, device=device, **options.loading)


def encode_records(
    encoder: Encoder,
    records: Iterable[Record],
    options: JobOptions,
    layout: ShardLayout,
    folder: Path,
    send: Callable[[Encoded | ShardReport], None],
    stopped: Callable[[], bool],
) -> None:
    """Encode records into shards until there are no more or the job is stopped.

    If `records` or the encoder raises an exception, the shard is ended with what is encoded, then it is raised.

    Args:
        encoder: the encoder.
        records: drawn in this thread, some ahead.
        options: the job's.
        layout: the shards'.
        folder: the job's.
        send: takes what is done; called in this thread and in another.
        stopped: asked after each batch.

    Raises:
        OSError: a shard cannot be written.
    """
    clock, seconds = BusyClock(), 0.0
    limits = (int(options.shard_images), int(options.shard_bytes))
    shards = ShardStream(folder, options.format, layout, *limits, send)
    try:
        try:
            with closing(embed_records(encoder, records, options, clock)) as outcomes:
                for outcome in outcomes:
                    shards.put(outcome.batch)
                    before, seconds = seconds, clock.seconds()
                    send(Encoded(outcome.reports, seconds - before))
                    if stopped():
                        break
        except Exception:
            shards.finish()
            raise
        shards.finish()
        send(Encoded([], clock.seconds() - seconds))  # the last batches' time, which was not known before
    finally:
        shards.abandon()
