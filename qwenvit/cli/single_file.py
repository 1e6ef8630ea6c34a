"""A few images into one file, one at a time, with a table of what each took.

The embeddings go to the disk as they come. Without a folder of shards there is nothing to continue from; what a run has
encoded when it is interrupted is kept, in a file of its own if there is a larger one in its place.
"""

import argparse
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from qwenvit.cli.loading import CommandError, load, pixel_bounds
from qwenvit.cli.terminal import one_line, printable, say
from qwenvit.datasets.find import Records, find_records
from qwenvit.datasets.formats import open_writer
from qwenvit.datasets.image_batches import embed_in_batches
from qwenvit.datasets.item import EncodedItem, ShardLayout
from qwenvit.datasets.record import Record
from qwenvit.datasets.signals import Interrupted, StopSignals
from qwenvit.encoder import Encoder
from qwenvit.item_stream import EncodedBatch
from qwenvit.outputs import ItemEmbeddings
from qwenvit.weights.header import read_header
from qwenvit.weights.save import sync_folder

HANDFUL = 64
"""Up to so many images are encoded one at a time, so that the table has the time of each; more go in batches."""
OF_THE_IMAGE = (ArithmeticError, MemoryError, OSError, TypeError, ValueError, torch.OutOfMemoryError)

Result = tuple[Record, ItemEmbeddings | Exception, float | None]
"""A record, its embeddings or why there are none, and the milliseconds that this took."""


def encode_to_file(arguments: argparse.Namespace) -> int:
    """Embed the inputs into one file; print a row for each image, and name those that fail.

    Raises:
        CommandError: the file exists, and has more images or something else.
        Interrupted: a signal came; what was encoded is written.
    """
    target: Path = arguments.output.expanduser()
    for name in ("max_tokens", "resize"):
        if arguments.video and getattr(arguments, name) is not None:
            raise CommandError(f"--{name.replace('_', '-')}: only for images; not with --video")
    records = find_records(
        arguments.inputs, video=arguments.video, verify=arguments.verify, image_column=arguments.image_column
    )
    existing = 0 if arguments.overwrite else _count_in(target)
    expected = records.expected or 0
    if expected < existing and not records.has_archives:
        raise CommandError(
            f"--output: {target} has {existing} images, and the inputs are {expected}; choose another file, or pass "
            "--overwrite"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own length: one made from the target's could be too long for the file system.
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    with StopSignals() as signals:
        try:
            with _create(partial, target) as stream:  # before a model is loaded: the folder may be read-only
                encoded, failed = _write(stream, records, arguments, signals)
            written = _publish(partial, target, encoded, existing)
        finally:
            partial.unlink(missing_ok=True)
    total = max(records.expected or 0, encoded + failed)
    say(f"{encoded} of {total} images -> {printable(str(written)) if written else 'nothing written'}")
    if signals.signum is not None:
        raise Interrupted(signals.signum)
    return 0 if encoded == total else 1


def _write(stream: BinaryIO, records: Records, arguments: argparse.Namespace, signals: StopSignals) -> tuple[int, int]:
    """Write the embeddings until the inputs or a signal ends; return how many images are encoded and have failed."""
    encoder = load(arguments)
    encoder.image_processor.with_bounds(**pixel_bounds(arguments))  # fail on impossible bounds here, not at every file
    layout = ShardLayout(encoder.config, arguments.model, encoder.dtype, True, False, {})
    writer = open_writer("safetensors", stream, layout)
    signals.at_once = False
    encoded = failed = 0
    with closing(_until_interrupted(_results(encoder, records, arguments), signals)) as results:
        for record, outcome, milliseconds in results:
            if encoded + failed == 0 and not arguments.quiet:
                say(f"{'image':<32} {'grid':>9} {'tokens':>7} {'ms':>9} {'norm':>9}")
            if isinstance(outcome, Exception):
                failed += 1
                say(f"qwenvit: error: {printable(record.id)}: {one_line(outcome)}", sys.stderr)
            else:
                encoded += 1
                writer.add(_item(record, outcome))
                if not arguments.quiet:
                    say(_table_row(record, outcome, milliseconds))
            if writer.is_full:
                say("qwenvit: error: a file cannot have more images: give a folder as --output", sys.stderr)
            if signals.signum is not None or writer.is_full:
                break
    if encoded:
        writer.finish()
        stream.flush()
        os.fsync(stream.fileno())
    return encoded, failed


def _create(partial: Path, target: Path) -> BinaryIO:
    try:
        return partial.open("x+b")
    except OSError as error:
        raise CommandError(f"--output: {target}: {error.strerror}") from error


def _count_in(target: Path) -> int:
    """Return the number of images in an existing file.

    Raises:
        CommandError: the file has something else.
    """
    if not os.path.lexists(target):
        return 0
    try:
        read_header(target)  # opening a named pipe would never return
        with safe_open(target, "pt") as file:
            return len(json.loads((file.metadata() or {})["grids"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CommandError(
            f"--output: {target} is no file of embeddings ({one_line(error)}); choose another, or pass --overwrite"
        ) from error


def _publish(partial: Path, target: Path, encoded: int, existing: int) -> Path | None:
    """Give the finished file its name, or if a larger one has it, another name; return it."""
    if not encoded:
        return None
    if encoded < existing:
        target = target.with_name(f"{target.stem}.incomplete{target.suffix}")
    os.replace(partial, target)
    sync_folder(target.parent)
    return target


def _results(encoder: Encoder, records: Records, arguments: argparse.Namespace) -> Generator[Result]:
    options = pixel_bounds(arguments) | {"decode": arguments.decode}
    if arguments.resize is not None:
        options["resize"] = arguments.resize
    handful = records.expected is not None and records.expected <= HANDFUL
    for is_video, group in groupby(records, key=lambda record: record.is_video):
        if is_video or handful:
            for record in group:
                yield _encode_one(encoder, record, options)
            continue
        yield from _encode_batches(encoder, group, options, arguments.workers)


def _until_interrupted(results: Generator[Result], signals: StopSignals) -> Generator[Result]:
    """Yield results until a second SIGINT, which does not wait for the image that is being encoded."""
    with closing(results):
        try:
            yield from results
        except KeyboardInterrupt:
            signals.signum = signal.SIGINT


def _encode_batches(
    encoder: Encoder, records: Iterator[Record], options: dict[str, Any], workers: int | None
) -> Iterator[Result]:
    def results_of(batch: EncodedBatch[Record]) -> list[Result]:
        pairs = zip(batch.items, batch.embeddings, strict=True)
        return [(record, batch.embeddings.errors.get(i, item), None) for i, (record, item) in enumerate(pairs)]

    def encode_alone(record: Record) -> list[Result]:
        return [_encode_one(encoder, record, options)]

    batches = embed_in_batches(encoder, records, results_of, encode_alone, num_workers=workers, **options)
    with closing(batches):
        for results in batches:
            yield from results


def _encode_one(encoder: Encoder, record: Record, options: dict[str, Any]) -> Result:
    start = time.perf_counter()
    try:
        source = record.open()
        if record.is_video:
            bounds = {name: options[name] for name in ("min_pixels", "max_pixels")}
            item = encoder.encode_video(str(source), **bounds)[0]
        else:
            item = encoder.encode(source, **options)[0]
        if item.tokens.is_cuda:
            torch.cuda.synchronize(item.tokens.device)
    except OF_THE_IMAGE as error:
        return record, error, None
    return record, item, (time.perf_counter() - start) * 1e3


def _item(record: Record, item: ItemEmbeddings) -> EncodedItem:
    host = item.cpu()
    return EncodedItem(
        record, host.grid, len(host.tokens), host.tokens, host.deepstack, None, host.is_video, host.times
    )


def _table_row(record: Record, item: ItemEmbeddings, milliseconds: float | None) -> str:
    grid = "x".join(map(str, item.grid if item.is_video else item.grid[1:]))
    took = "" if milliseconds is None else f"{milliseconds:.1f}"
    norm = float(item.tokens.float().norm(dim=1).mean())
    return f"{printable(record.id)[-32:]:<32} {grid:>9} {len(item.tokens):>7} {took:>9} {norm:>9.2f}"
