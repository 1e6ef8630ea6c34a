"""Encoding a data set: many files in, numbered shards out, continued by the same call after any death."""

import os
import queue
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from qwenvit.arguments import Impl
from qwenvit.config.published import DEFAULT_MODEL
from qwenvit.datasets.device import encode_records, load_encoder
from qwenvit.datasets.find import Records, find_records
from qwenvit.datasets.formats import SUFFIXES
from qwenvit.datasets.ledger import Encoded, Ledger
from qwenvit.datasets.lock import FolderLock
from qwenvit.datasets.manifest import Manifest
from qwenvit.datasets.options import JobOptions, Resolved
from qwenvit.datasets.progress import ItemReport, Meter, Progress
from qwenvit.datasets.shard_folder import ShardReport, drop_unfinished
from qwenvit.datasets.signals import Interrupted, StopSignals
from qwenvit.datasets.workers import Workers
from qwenvit.encoder import Encoder
from qwenvit.pooling import PoolMode
from qwenvit.preprocess.jpeg import Decoder
from qwenvit.preprocess.options import ImageOptions
from qwenvit.towers.checkpoint import ConfigSource

LOCK_NAME = ".lock"

Device = torch.device | str | int


def encode_dataset(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | Encoder = DEFAULT_MODEL,
    devices: Device | Iterable[Device] | None = None,
    dtype: torch.dtype | str | None = None,
    impl: Impl = "auto",
    subfolder: str | None = None,
    config: ConfigSource | None = None,
    family: str | None = None,
    prefix: str | None = None,
    adapter: str | os.PathLike[str] | Literal[False] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    format: Literal["safetensors", "parquet", "npy"] = "safetensors",  # noqa: A002 as the command calls it
    pool: PoolMode | Literal["none"] | None = None,
    normalize: bool = False,
    tokens: bool = True,
    shard_images: int = 10_000,
    shard_bytes: int = 2**30,
    video: bool = False,
    verify: bool = False,
    image_column: str | None = None,
    overwrite: bool = False,
    num_workers: int | None = None,
    decode: Decoder = "pillow",
    progress: Callable[[Progress], None] | None = None,
    on_item: Callable[[ItemReport], None] | None = None,
    **options: Unpack[ImageOptions],
) -> Manifest:
    """Encode a data set into numbered shards in a folder, and return the folder's manifest.

    The same call continues after any death, SIGKILL, power failure and full disk included: inputs are done that have a
    row in a whole shard, by id and content. What is lost are at most two shards of each device: one that was on its way
    to the disk, and one that was being written. The first SIGINT, SIGTERM or SIGHUP ends the job after the current
    batch, with its shard written. `errors.jsonl` has the reasons of inputs that could not be encoded; the next call
    tries them again. An input whose content has changed since it was encoded is such a failure: its old row stays.

    The bits of a row depend on its image alone on Hopper GPUs in 16 bits, and on a CPU with the same number of torch's
    threads. With other GPUs and dtypes, where a job was interrupted may change last bits.

    Args:
        inputs: files, folders, globs, tar archives, parquet files, or `"-"` for a list on standard input.
        output: the folder of the shards, made if missing.
        model: as in `Encoder.from_pretrained`, or a loaded encoder, which the arguments of loading then do not concern.
        devices: one device, or several: `"all"` GPUs, `"0,1"`, `["cuda:0", "cuda:1"]`. Each of several gets a process;
            a script that asks for several must be importable (`if __name__ == "__main__":`). None: the GPU if there is
            one, else the CPU.
        dtype, impl, subfolder, config, family, prefix, adapter, revision, token, cache_dir, local_files_only,
            force_download: as in `Encoder.from_pretrained`.
        format: of the shards; see `qwenvit/datasets/README.md`.
        pool: one vector for each input, as in `Embeddings.pooled`. None or `"none"`: none.
        normalize: divide vectors by their length.
        tokens: False leaves the tokens out of the output.
        shard_images: most rows of a shard.
        shard_bytes: most bytes of the tensors of a shard, or one larger row.
        video: also encode video files.
        verify: tell changed inputs by a hash of their content, not by size and time.
        image_column: the column of parquet files that has the images. None: found by its type.
        overwrite: remove the rows of a job with other settings, instead of refusing to mix both.
        num_workers: threads that decode, for each device, as in `Encoder.encode`.
        decode: what decodes JPEG files, as in `Encoder.encode`.
        progress: called a few times a second, and at the end.
        on_item: called for each input that is encoded or fails.
        options: min_pixels, max_pixels, max_tokens, size, resize; see `ImageOptions`.

    Returns:
        The manifest. `counts["failed"]` is the number of inputs that could not be encoded.

    Raises:
        TypeError: an unknown option.
        ValueError: an impossible option; inputs that are not there, or two of one id; a folder that has rows of other
            settings (the message names each that differs).
        ImportError: a format or an input needs a package that is not installed.
        BlockingIOError: another job writes to the folder.
        ChildProcessError: the process of one of several devices died.
        OSError: an input or the model cannot be read, or the folder not written, as on a full disk. Whole shards stay.
        Interrupted: a signal came; what was encoded is written. It is a KeyboardInterrupt.
    """
    loading: dict[str, Any] = {
        "dtype": dtype,
        "impl": impl,
        "subfolder": subfolder,
        "config": config,
        "family": family,
        "prefix": prefix,
        "adapter": adapter,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    job = JobOptions(
        model=model,
        loading=loading,
        format=format,
        pool=None if pool == "none" else pool,
        normalize=normalize,
        tokens=tokens,
        shard_images=shard_images,
        shard_bytes=shard_bytes,
        num_workers=num_workers,
        decode=decode,
        video=video,
        verify=verify,
        image_column=image_column,
        image=options,
    )
    job.check()
    targets = _device_names(devices)
    if isinstance(model, Encoder) and targets != [None]:
        raise ValueError(f"devices: expected None with a loaded encoder, got {devices!r}")
    folder = Path(output).expanduser()
    if folder.suffix in SUFFIXES.values():
        raise ValueError(f"output: expected a folder, got {folder}")
    inputs = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    with StopSignals() as signals:
        records = find_records(inputs, video=video, verify=verify, image_column=image_column, exclude=folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder / LOCK_NAME)
        try:
            found = Manifest.read(folder)
            if found is not None and not overwrite:  # before a model is loaded
                found.check_settings(job.requested(), job.requested())
            meter = Meter(lambda: records.expected, len(targets), progress)

            def begin(resolved: Resolved) -> Ledger:
                return Ledger.begin(folder, resolved, job, overwrite, meter, on_item)

            run = _run_here if len(targets) == 1 else _run_workers
            ledger = run(targets, job, folder, lock, records, begin, signals)
        finally:
            lock.release()
        if signals.signum is not None:
            raise Interrupted(signals.signum, ledger.manifest)
        return ledger.manifest


def _run_here(
    targets: list[str | None],
    job: JobOptions,
    folder: Path,
    _: FolderLock,
    records: Records,
    begin: Callable[[Resolved], Ledger],
    signals: StopSignals,
) -> Ledger:
    """Run a job of one device in this process."""
    encoder = load_encoder(job, targets[0])
    resolved = Resolved.of(encoder, job)
    ledger = begin(resolved)
    signals.at_once = False
    shards: queue.SimpleQueue[ShardReport] = queue.SimpleQueue()  # a thread fills it

    def send(message: Encoded | ShardReport) -> None:
        if isinstance(message, ShardReport):
            shards.put(message)
        else:
            ledger.note(message)
            note_shards()

    def note_shards() -> None:
        while not shards.empty():
            ledger.note(shards.get())

    complete = False
    try:
        undone = ledger.undone(records, signals)
        encode_records(encoder, undone, job, resolved.layout, folder, send, lambda: signals.signum is not None)
        complete = ledger.exhausted and signals.signum is None
    finally:
        note_shards()
        ledger.end(complete=complete)
    return ledger


def _run_workers(
    targets: list[str | None],
    job: JobOptions,
    folder: Path,
    lock: FolderLock,
    records: Records,
    begin: Callable[[Resolved], Ledger],
    signals: StopSignals,
) -> Ledger:
    """Run a job of several devices, each in a process of its own."""
    ledger, complete = None, False
    try:
        with Workers([str(target) for target in targets], job, folder, lock.descriptor) as workers:
            ledger = begin(workers.resolve())
            signals.at_once = False
            workers.run(ledger.undone(records, signals), ledger, lambda: signals.signum is not None)
        complete = ledger.exhausted and signals.signum is None
    finally:
        if ledger is not None:
            if not complete:
                with suppress(OSError):
                    drop_unfinished(folder, SUFFIXES[job.format])  # of workers that were killed
                    ledger.recount()  # they may have ended a shard and not told
            ledger.end(complete=complete)
    return ledger


def _device_names(devices: Device | Iterable[Device] | None) -> list[str | None]:
    """Return the devices of a job as torch names them; None is the default one.

    Raises:
        ValueError: no device, or all GPUs where there is none.
    """
    if devices is None:
        return [None]
    if devices == "all":
        if not torch.cuda.device_count():
            raise ValueError("devices: expected a machine with GPUs for 'all', found none")
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    listed: list[Device]
    if isinstance(devices, str):
        listed = [*devices.split(",")]
    elif isinstance(devices, int | torch.device):
        listed = [devices]
    else:
        listed = list(devices)
    names = [str(device).strip() for device in listed]
    if not all(names) or not names:
        raise ValueError(f"devices: expected one or several devices, got {devices!r}")
    return [f"cuda:{name}" if name.isdecimal() else name for name in names]
