"""A process for each device, fed from one stream of records by the process that keeps the books.

Each worker has a pipe of its own, asks for records through it and tells what is done: nothing is shared that a worker
could leave locked when it is killed. A worker ends when its pipe does, as when the parent is killed.
"""

import builtins
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, context, get_context, reduction
from pathlib import Path
from typing import Any

import torch

from qwenvit.arguments import check_device
from qwenvit.datasets.device import encode_records, load_encoder
from qwenvit.datasets.ledger import Encoded, Ledger
from qwenvit.datasets.options import JobOptions, Resolved
from qwenvit.datasets.record import Record
from qwenvit.datasets.shard_folder import ShardReport
from qwenvit.datasets.signals import SIGNALS

RECORDS_AT_ONCE = 32
"""Records that a worker gets at a time; it asks for the next while it works on these."""
SECONDS_TO_DRAW = 0.1
"""A slow source gives a worker fewer, rather than let the others wait."""


@dataclass(frozen=True)
class _NeedRecords:
    """A worker asks for records."""


@dataclass(frozen=True)
class _Warned:
    """A warning in a worker."""

    text: str


@dataclass(frozen=True)
class _Finished:
    """A worker is done: its shards are whole."""

    error: Exception | None


class _SharedDescriptor:
    """An open file that a worker inherits, and with it the folder's lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, state: Any) -> None:
        self._descriptor = state.detach()


@dataclass
class _Worker:
    device: str
    process: context.SpawnProcess
    pipe: "connection.Connection[Any, Any]"
    waits: bool = False
    """Whether it has asked for records and got no answer."""
    finished: bool = False

    def send(self, records: list[Record] | None) -> None:
        """Send records, or None if there are no more."""
        self.waits = False
        with suppress(ConnectionError):  # its end is noticed elsewhere
            self.pipe.send(records)


@dataclass
class Workers:
    """The workers of a job. Used as a context, which kills those that are left at its end."""

    devices: Sequence[str]
    options: JobOptions
    folder: Path
    lock: int
    """The descriptor of the folder's lock."""
    _workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> "Workers":
        spawn = get_context("spawn")
        self._stop = spawn.RawValue("b", 0)  # without a lock
        try:
            with _blocked_signals():
                for device in self.devices:
                    pipe, theirs = spawn.Pipe()
                    arguments = (
                        theirs, self._stop, _SharedDescriptor(self.lock), device, torch.get_num_threads(),
                        self.options, self.folder,
                    )  # fmt: skip
                    process = spawn.Process(target=_work, args=arguments, name=f"qwenvit {device}", daemon=True)
                    process.start()
                    theirs.close()
                    self._workers.append(_Worker(device, process, pipe))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
            worker.pipe.close()

    def resolve(self) -> Resolved:
        """Wait until all have loaded the model, and return what is known then.

        Raises:
            ValueError: the settings differ between devices, as the default dtype of a GPU and a CPU.
            Exception: what a worker raised.
        """
        found: list[Resolved] = []
        while len(found) < len(self._workers):
            for worker, message in self._messages():
                if isinstance(message, Resolved):
                    found.append(message)
                elif isinstance(message, _NeedRecords):
                    worker.waits = True
                elif isinstance(message, _Finished) and message.error is not None:
                    raise message.error
        if differing := {
            key for one in found for key, value in one.settings.items() if value != found[0].settings[key]
        }:
            raise ValueError(f"devices: expected equal settings, got others of {', '.join(sorted(differing))}")
        return found[0]

    def run(self, records: Iterator[Record], ledger: Ledger, stopped: Callable[[], bool]) -> None:
        """Feed the workers until there are no more records, and wait for their last shards.

        Raises:
            ChildProcessError: a worker died, or failed with an error that only it knows; the others have ended their
                shards.
            Exception: what `records` or a worker raised, after the others have ended their shards.
        """
        errors: list[Exception] = []
        source_errors: list[Exception] = []
        more = True
        while not all(worker.finished for worker in self._workers):
            if errors or stopped():
                self._stop.value, more = 1, False
            for worker in self._workers:
                if worker.waits:
                    chunk = _draw(records, source_errors) if more else []
                    more = bool(chunk) and not source_errors
                    worker.send(chunk or None)
            for worker, message in self._messages():
                if isinstance(message, _NeedRecords):
                    worker.waits = True
                elif isinstance(message, Encoded | ShardReport):
                    try:
                        ledger.note(message)
                    except Exception as error:  # noqa: BLE001
                        errors.append(error)
                elif isinstance(message, _Finished) and message.error is not None:
                    errors.append(message.error)
        if errors or source_errors:
            raise (errors or source_errors)[0]

    def _messages(self) -> Iterator[tuple[_Worker, Any]]:
        """Yield what the workers have sent, after waiting a while for something."""
        left = {worker.pipe: worker for worker in self._workers if not worker.finished}
        for pipe in connection.wait(list(left), timeout=0.2):
            worker = left[pipe]  # type: ignore[index]
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                message = _Finished(_death(worker))
            if isinstance(message, _Warned):
                warnings.warn(message.text, stacklevel=2)
            worker.finished = worker.finished or isinstance(message, _Finished)
            yield worker, message


def _draw(records: Iterator[Record], errors: list[Exception]) -> list[Record]:
    """Return the next records, and add to `errors` what `records` raises after them."""
    chunk: list[Record] = []
    start = time.perf_counter()
    try:
        for record in records:
            chunk.append(record)
            if len(chunk) == RECORDS_AT_ONCE or time.perf_counter() - start > SECONDS_TO_DRAW:
                break
    except Exception as error:  # noqa: BLE001 raised once what was drawn is encoded
        errors.append(error)
    return chunk


def _death(worker: _Worker) -> ChildProcessError:
    code = worker.process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return ChildProcessError(
        f"the process of device {worker.device} {how}; whole shards are kept, and the same call continues the job"
    )


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Start workers that no signal stops but SIGKILL: Ctrl-C reaches all, and the parent decides what to do."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    pipe: "connection.Connection[Any, Any]",
    stop: Any,
    lock: _SharedDescriptor,  # noqa: ARG001 open as long as this process lives
    device: str,
    num_threads: int,
    options: JobOptions,
    folder: Path,
) -> None:
    """Run a worker, with the parent's number of torch's threads: on a CPU the order of sums may depend on it."""
    torch.set_num_threads(num_threads)
    sending = threading.Lock()
    inbox: queue.SimpleQueue[list[Record] | None] = queue.SimpleQueue()

    def send(message: object) -> None:
        try:
            with sending:
                pipe.send(message)
        except ConnectionError:
            os._exit(1)  # the parent is gone

    def receive() -> None:  # always, so that the parent never waits for a worker that waits for the parent
        while True:
            try:
                inbox.put(pipe.recv())
            except (EOFError, OSError):
                os._exit(1)  # the parent is gone

    def records() -> Iterator[Record]:
        send(_NeedRecords())
        while (chunk := inbox.get()) is not None:
            send(_NeedRecords())
            for record in chunk:
                if stop.value:
                    return
                yield record

    threading.Thread(target=receive, daemon=True).start()
    warnings.showwarning = lambda message, *_, **__: send(_Warned(str(message)))
    try:
        if check_device(device).type == "cuda":
            torch.cuda.set_device(device)
        encoder = load_encoder(options, device)
        resolved = Resolved.of(encoder, options)
        send(resolved)
        encode_records(encoder, records(), options, resolved.layout, folder, send, lambda: bool(stop.value))
    except Exception as error:  # noqa: BLE001 raised by the parent
        send(_Finished(_portable(error, device)))
    else:
        send(_Finished(None))


def _portable(error: Exception, device: str) -> Exception:
    """Return an error that another process can raise: not every exception survives being pickled."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    if getattr(builtins, type(error).__name__, None) is type(error):
        return type(error)(str(error))
    return ChildProcessError(f"device {device}: {type(error).__name__}: {error}")
