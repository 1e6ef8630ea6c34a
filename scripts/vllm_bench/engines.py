"""Engines in processes of their own: start them together, ask one at a time, keep what went wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from common.progress import progress

LOG_LINES = 40
"""Last lines of an engine's log that are kept when it fails."""
MEASURING_SECONDS = 60.0
"""Of the time that is left when engines start, at most half, what is kept for those that are ready: they must not be
killed because one is not."""
NOTED = "] qwenvit"
"""Lines of the log with this text are the plugin's own: vLLM's format ends with it before the message."""


class EngineError(Exception):
    """An engine did not do what it was asked."""


class Engine:
    """One engine's process.

    Args:
        name: a key of `cases.MODES`.
        options: the arguments of `vllm.LLM`.
        environment: the process's environment.
        log: the file that receives its output.
    """

    def __init__(self, name: str, options: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self.connection, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "vllm_bench.engine_process", str(theirs.fileno()), json.dumps(options)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()

    def answer(self, deadline: float) -> Any:
        """Return the next answer; `deadline` is by `time.monotonic`.

        Raises:
            EngineError: the engine reports an error, it ended, or it did not answer in time. After the last two it is
                killed.
        """
        while not self.connection.poll(min(0.5, max(0.0, deadline - time.monotonic()))):
            late = time.monotonic() >= deadline
            if late or self.process.poll() is not None:
                ending = "no answer in time" if late else f"its process ended with {self.process.returncode}"
                self.stop()
                raise EngineError(ending)
        try:
            fine, value = self.connection.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise EngineError(f"its process ended: {error!r}") from error
        if not fine:
            raise EngineError(value.strip().splitlines()[-1][:300])
        return value

    def ask(self, method: str, deadline: float, **arguments: Any) -> Any:
        """Return what a method of `engine_process.Session` returns. Raises as `answer`."""
        try:
            self.connection.send((method, arguments))
        except OSError as error:
            self.stop()
            raise EngineError(f"its process ended: {error!r}") from error
        return self.answer(deadline)

    def stop(self) -> None:
        """Kill the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()

    @property
    def stopped(self) -> bool:
        return self.connection.closed

    def log_lines(self, containing: str = "") -> list[str]:
        """Return the last lines of the log, or those that contain a text."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [line[:400] for line in lines if containing in line][-LOG_LINES:]


class Engines:
    """The engines of one model. What fails is noted in the result, and the other engines go on.

    Args:
        result: figures of a model; gets `failed`, `logs` and `engines`.
        deadline: when all has to be done, by `time.monotonic`.
    """

    def __init__(self, result: dict[str, Any], deadline: float) -> None:
        self.result, self.deadline = result, deadline
        self.running: dict[str, Engine] = {}

    def start(self, engine: Engine) -> None:
        self.running[engine.name] = engine

    def wait(self, seconds: float) -> None:
        """Wait until every engine is ready or has failed."""
        left = self.deadline - time.monotonic()
        limit = self._limit(min(seconds, left - min(MEASURING_SECONDS, left / 2)))
        for name in list(self.running):
            progress(f"{self.result['model']}: waiting for {name}")
            described = self._noting(name, "start", lambda engine: engine.answer(limit))
            if described is None:
                if name in self.running:
                    self.drop(name)
            else:
                noted = self.running[name].log_lines(NOTED)
                self.result["engines"][name] = described | {"log": noted[-5:]}

    def ask(self, name: str, method: str, seconds: float, **arguments: Any) -> Any:
        """Return an engine's answer, which may take so many seconds; None where it fails or has failed."""
        if name not in self.running:
            return None
        limit = self._limit(seconds)
        return self._noting(name, method, lambda engine: engine.ask(method, limit, **arguments))

    def ask_each(self, names: Iterable[str], method: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Return the answers of engines asked in turn, by name, of those that do not fail."""
        answers = {name: self.ask(name, method, seconds, **arguments) for name in names}
        return {name: answer for name, answer in answers.items() if answer is not None}

    def stop(self) -> None:
        """Kill all engines."""
        for name in list(self.running):
            self.drop(name)

    def _limit(self, seconds: float) -> float:
        return min(time.monotonic() + seconds, self.deadline)

    def _noting(self, name: str, what: str, call: Callable[[Engine], Any]) -> Any:
        engine = self.running[name]
        try:
            return call(engine)
        except EngineError as error:
            self.note(name, what, str(error))
            if engine.stopped:
                del self.running[name]
            return None

    def note(self, name: str, what: str, why: str) -> None:
        """List a failure, and keep the end of the engine's log."""
        lines = self.running[name].log_lines()
        self.result["failed"].append((f"{name}, {what}", why))
        self.result["logs"][name] = lines
        progress("")
        print(f"{name}, {what}: {why}", *lines, sep="\n", file=sys.stderr, flush=True)

    def drop(self, name: str) -> None:
        """Kill an engine."""
        engine = self.running.pop(name)
        if not engine.stopped:
            engine.stop()
