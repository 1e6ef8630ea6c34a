"""The books of a job, kept in one process: what is done, what failed, and how far the job is."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwenvit import __version__
from qwenvit.datasets.failures import Failures
from qwenvit.datasets.formats import SUFFIXES
from qwenvit.datasets.manifest import Manifest
from qwenvit.datasets.options import JobOptions, Resolved
from qwenvit.datasets.progress import ItemReport, Meter
from qwenvit.datasets.record import Record, Unusable
from qwenvit.datasets.shard_folder import (
    DoneItems,
    ShardReport,
    drop_unfinished,
    files_of_shards,
    read_done,
    remove_all,
)
from qwenvit.datasets.signals import Interrupted, StopSignals

CHANGED = (
    "its content has changed since it was encoded, and the old row stays; to encode it again, remove the shard whose "
    "index names it"
)
SECONDS_BETWEEN_WRITES = 5.0
"""To write the manifest takes longer while the disk has shards to write. The next run counts the rows anew."""


@dataclass(frozen=True)
class Encoded:
    """What became of the records of a batch, and how long the device has worked since the last such message."""

    reports: list[ItemReport]
    busy_seconds: float


class Ledger:
    """Follows a job by the messages of those who encode, and keeps `manifest.json` and `errors.jsonl`.

    Attributes:
        manifest: the folder's manifest.
        exhausted: whether the inputs have come to their end.
    """

    def __init__(
        self, manifest: Manifest, done: DoneItems, meter: Meter, on_item: Callable[[ItemReport], None] | None
    ) -> None:
        self.manifest = manifest
        self.exhausted = False
        self._done = done
        self._failures = Failures(manifest.folder)
        self._meter = meter
        self._on_item = on_item
        self._next_write = 0.0
        self._has_news = False

    @classmethod
    def begin(
        cls,
        folder: Path,
        resolved: Resolved,
        options: JobOptions,
        overwrite: bool,
        meter: Meter,
        on_item: Callable[[ItemReport], None] | None,
    ) -> "Ledger":
        """Take up the work in a folder where the run before left it, or begin it.

        Raises:
            ValueError: the folder has rows of other settings, and `overwrite` is false; it is damaged.
            OSError: the folder cannot be read or written.
        """
        suffix = SUFFIXES[options.format]
        manifest = Manifest.read(folder)
        if manifest is None:
            if found := next(files_of_shards(folder), None):
                raise ValueError(f"{folder}: expected a folder without shards or with manifest.json, got {found.name}")
        elif overwrite and manifest.settings != resolved.settings:
            remove_all(folder)
            manifest = None
        else:
            manifest.check_settings(resolved.settings)
        drop_unfinished(folder, suffix)
        done, counts = read_done(folder, suffix)
        versions = manifest.versions if manifest else []
        versions = [*(version for version in versions if version != __version__), __version__]
        config = resolved.layout.config.to_hf()
        ledger = cls(Manifest(folder, resolved.settings, config, versions, counts), done, meter, on_item)
        ledger._write(last=True)
        meter.restart()
        return ledger

    def undone(self, records: Iterable[Record], signals: StopSignals) -> Iterator[Record]:
        """Yield the records that are not encoded yet, until a signal comes."""
        source = iter(records)
        while signals.signum is None:
            try:
                signals.at_once = True
                record = next(source, None)
                signals.at_once = False
            except Interrupted:
                return
            finally:
                signals.at_once = False
            if record is None:
                self.exhausted = True
                return
            if self._done.has(record.id, record.stamp):
                self._meter.skipped += 1
                self._meter.report()
            elif self._done.has_id(record.id):
                reason = record.content.reason if isinstance(record.content, Unusable) else CHANGED
                self.note(Encoded([ItemReport(record.id, (0, 0, 0), 0, reason)], 0.0))
            else:
                yield record

    def note(self, message: Encoded | ShardReport) -> None:
        """Count a batch, or a shard that is whole.

        Raises:
            OSError: the manifest cannot be written.
        """
        if isinstance(message, ShardReport):
            counts = self.manifest.counts
            counts["images"] += message.images
            counts["tokens"] += message.tokens
            counts["bytes"] += message.bytes
            counts["shards"] += 1
            self._has_news = True
        else:
            self._note_batch(message)
        if self._has_news and time.monotonic() >= self._next_write:
            self._write()

    def _note_batch(self, message: Encoded) -> None:
        self._meter.busy_seconds += message.busy_seconds
        for report in message.reports:
            self._meter.count(report)
            if report.error is None:
                self._failures.encoded(report.id)
            else:
                self._failures.add(report.id, report.error)
                self._has_news = True
            if self._on_item is not None:
                self._on_item(report)
        self._meter.report()

    def recount(self) -> None:
        """Count the rows of the folder anew.

        Raises:
            OSError: an index cannot be read.
        """
        suffix = SUFFIXES[self.manifest.settings["format"]]
        self.manifest.counts = read_done(self.manifest.folder, suffix)[1]

    def end(self, *, complete: bool) -> None:
        """Write what the run leaves behind.

        Args:
            complete: whether all inputs were drawn, and what became of each is known.

        Raises:
            OSError: it cannot be written, if `complete`; otherwise another error is on its way.
        """
        if complete:
            self._failures.end_of_inputs()
            self.manifest.complete = True
            self._write(last=True)
        else:
            with suppress(OSError):
                self._write(last=True)
        self._meter.report(last=True)

    def _write(self, *, last: bool = False) -> None:
        self._failures.write(last=last)
        self.manifest.counts["failed"] = len(self._failures)
        self.manifest.write()
        self._next_write, self._has_news = time.monotonic() + SECONDS_BETWEEN_WRITES, False
