"""The threads that write shards while the device goes on: one writes, another brings whole shards to the disk."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenvit.datasets.formats import SUFFIXES, ShardWriter, open_writer
from qwenvit.datasets.item import EncodedItem, ShardLayout
from qwenvit.datasets.shard_folder import ShardFile, ShardReport, next_number

BATCHES_WAITING = 2
"""Batches that wait for the disk in pinned memory; a faster device waits for it then."""


@dataclass(frozen=True)
class CopiedBatch:
    """Items whose tensors are, or will be, on the CPU."""

    items: list[EncodedItem]
    copied: torch.cuda.Event | None
    """After this event the tensors are there; None: they are."""


class ShardStream:
    """Writes batches into shards of a folder, in a thread of its own.

    A shard that has all its rows is brought to the disk by another thread, while the next one is written: until the
    disk has a gigabyte, a batch or two would not be enough for the device to go on.

    Args:
        folder: the folder.
        format: the format of the shards.
        layout: what the items have in common.
        most_images: images of a shard.
        most_bytes: bytes of the tensors of a shard, or of one larger item.
        on_shard: called with each shard that is whole, one after another, in another thread.
    """

    def __init__(
        self,
        folder: Path,
        format: str,  # noqa: A002 as everywhere in this room
        layout: ShardLayout,
        most_images: int,
        most_bytes: int,
        on_shard: Callable[[ShardReport], None],
    ) -> None:
        self._folder, self._format, self._layout = folder, format, layout
        self._most_images, self._most_bytes = most_images, most_bytes
        self._on_shard = on_shard
        self._batches: queue.Queue[CopiedBatch | None] = queue.Queue(BATCHES_WAITING)
        self._error: Exception | None = None
        self._abandoned = False
        self._file: ShardFile | None = None
        self._writer: ShardWriter | None = None
        self._bytes = 0
        self._next_number = next_number(folder)
        self._disk = ThreadPoolExecutor(1, "qwenvit-shard-end")
        self._ending: Future[None] | None = None
        self._thread = threading.Thread(target=self._run, name="qwenvit-shards")
        self._thread.start()

    def put(self, batch: CopiedBatch) -> None:
        """Write a batch, later; wait while others do.

        Raises:
            OSError: earlier ones could not be written, as on a full disk.
        """
        self._batches.put(batch)
        self._raise()

    def finish(self) -> None:
        """Write what is left, and end the last shard.

        Raises:
            OSError: it could not be written. Shards that were whole are there.
        """
        self._batches.put(None)
        self._thread.join()
        self._raise()

    def abandon(self) -> None:
        """End the thread without the shard that is being written. Does nothing after `finish`."""
        self._abandoned = True
        if self._thread.is_alive():
            self._batches.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            if self._error is None and not self._abandoned:
                try:
                    self._write(batch)
                except Exception as error:  # noqa: BLE001 raised by the next call
                    self._fail(error)
            del batch  # its pinned memory would stay until the next batch
        try:
            if self._file is not None and not self._abandoned:
                self._end_shard()
            self._await_end()
        except Exception as error:  # noqa: BLE001
            self._fail(error)
        if self._file is not None:
            self._file.abandon()
        self._disk.shutdown()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            told = f"{error.strerror}; whole shards are kept, and the same call continues the job"
            error = type(error)(error.errno, told, str(self._folder))
        self._error = self._error or error
        if self._file is not None:  # its space may be what the manifest needs
            self._file.abandon()
        self._file = self._writer = None

    def _write(self, batch: CopiedBatch) -> None:
        if self._ending is not None and self._ending.done():  # if it has failed, the next shard would be lost too
            self._await_end()
        if batch.copied is not None:
            batch.copied.synchronize()
        for item in batch.items:
            if self._file is not None and (
                self._file.images >= self._most_images or self._bytes + item.num_bytes > self._most_bytes
            ):
                self._end_shard()
            if self._file is None or self._writer is None:
                self._file = ShardFile(self._folder, SUFFIXES[self._format], self._next_number)
                self._next_number = self._file.number + 1
                self._writer = open_writer(self._format, self._file.stream, self._layout)
                self._bytes = 0
            self._writer.add(item)
            self._bytes += item.num_bytes
            self._file.add_to_index(item.record.id, item.record.stamp, item.grid, item.num_tokens)
            if self._writer.is_full:
                self._end_shard()

    def _end_shard(self) -> None:
        assert self._file is not None and self._writer is not None  # noqa: S101, PT018
        self._writer.finish()
        self._await_end()
        self._ending = self._disk.submit(self._bring_to_disk, self._file)
        self._file = self._writer = None

    def _bring_to_disk(self, file: ShardFile) -> None:
        try:
            self._on_shard(file.finish())
        except Exception:
            file.abandon()
            raise

    def _await_end(self) -> None:
        """Wait until the shard before is whole.

        Raises:
            OSError: it could not be written.
        """
        ending, self._ending = self._ending, None
        if ending is not None:
            ending.result()
