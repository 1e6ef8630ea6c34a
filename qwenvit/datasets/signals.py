"""Stopping a job by a signal without losing what it has encoded."""

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenvit.datasets.manifest import Manifest

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A job was stopped by a signal, after it had written what it had encoded.

    Attributes:
        signum: the signal; by custom a command exits with 128 + signum.
        manifest: the manifest of what is there, or None if the job had not begun to write.
    """

    def __init__(self, signum: int, manifest: "Manifest | None" = None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.manifest = manifest


class StopSignals:
    """While this context is entered, the first SIGINT, SIGTERM or SIGHUP asks the job to stop.

    A second SIGINT interrupts at once. In a thread other than the main one, signals stay as they are.

    Attributes:
        signum: the signal that came, or None.
        at_once: whether a signal raises `Interrupted` where the main thread is, as while a model loads or while the
            next input is awaited; otherwise the job looks at `signum` after each batch.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.at_once = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.at_once:
            self.at_once = False
            raise Interrupted(signum)
