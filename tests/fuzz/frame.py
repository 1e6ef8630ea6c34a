"""The frame of the fuzzers: seeded cases, run in worker processes under limits, and counted.

A fuzzer is a module of this folder, named in `run.FUZZERS`, with

- `DOCUMENTED`, the exceptions that the documentation promises for bad input, as a tuple of types;
- `cases(seed, count)`, which yields exactly `count` cases, the same ones for the same arguments. It is called in the
  worker and called again after a crash, where the cases already run are skipped: draw each case from a generator of
  its own (`random.Random(f"{seed}/{index}")`), and do what takes long once (`functools.cache`) or in `Case.run`.
  Before the first case it may call the library once: a first call imports and allocates more than others.

`Case.run(folder)` does the damage and calls the library, in an empty folder that is removed afterwards:

- it returns normally if the result equals the truth,
- raises `DifferentError` if the library took the damage and gave something else without a word,
- and lets the library's exceptions pass.

For example:

    DOCUMENTED = (ValueError, OSError)

    def cases(seed: int, count: int) -> Iterator[Case]:
        for index in range(count):
            generator = random.Random(f"{seed}/{index}")
            place = generator.randrange(len(sound_file()))
            yield Case(f"byte {place} flipped", functools.partial(flipped, place))

    def flipped(place: int, folder: Path) -> None:
        ...
        if not torch.equal(loaded, truth):
            raise DifferentError("the loaded tensor differs")

Each case has 8 seconds, and its worker may grow by `MEMORY_BYTES`. Errors of lower layers that are ValueErrors by
accident (`UnicodeError`, `json.JSONDecodeError`) count as undocumented: they name neither file nor field.

`make fuzz SEED=3` runs 1,000 cases of each fuzzer; `test_fuzz.py` runs a few. One case alone, in a debugger:
`PYTHONPATH=tests:scripts python -m fuzz.run --seed 3 --case 17 checkpoints`.
"""

import importlib
import json
import multiprocessing
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

SECONDS = 8.0
"""How long a case may take."""
START_SECONDS = 120.0
"""How long a worker may take to import the library, and to draw a case."""
MEMORY_BYTES = 512 << 20
"""How much memory a case may take besides what the worker had."""

EQUAL, REFUSED = "loaded equal", "refused as documented"
FAILURES = CRASH, HANG, UNDOCUMENTED, DIFFERENT, MEMORY = (
    "crash",
    "hang",
    "undocumented exception",
    "silently different",
    "too much memory",
)


class DifferentError(AssertionError):
    """The library took damaged input, and what it gave differs from the truth."""


@dataclass(frozen=True)
class Case:
    """One damaged input: what was done to it, and the function that does it and calls the library."""

    description: str
    run: Callable[[Path], None]


@dataclass
class Report:
    """What came of a fuzzer's cases."""

    fuzzer: str
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    seconds: float = 0.0

    def add(self, index: int, description: str, outcome: str, details: str, peak_bytes: int = 0) -> None:
        """Count a case; keep what is needed to repeat it if it failed."""
        self.counts[outcome] += 1
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        if outcome in FAILURES:
            self.failures.append(
                f"{self.fuzzer} --seed {self.seed} --case {index}: {outcome}: {description}\n{details}"
            )

    def __str__(self) -> str:
        total = sum(self.counts.values())
        counts = ", ".join(f"{self.counts[outcome]} {outcome}" for outcome in (EQUAL, REFUSED, *FAILURES))
        peak = f"peak memory +{self.peak_bytes >> 20} MB"
        line = f"{self.fuzzer}, seed {self.seed}: {total} cases in {self.seconds:.0f} s: {counts}; {peak}"
        return "\n".join([line, *self.failures])


def fuzz(fuzzer: str, seed: int, count: int) -> Report:
    """Run the cases of the module `fuzz.<fuzzer>` and return what came of them."""
    report, started = Report(fuzzer, seed), time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="qwenvit-fuzz-"))
    try:
        done = 0
        while done < count:
            done = _run_worker(report, seed, count, done, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    report.seconds = time.monotonic() - started
    return report


def run_alone(fuzzer: str, seed: int, count: int, index: int) -> None:
    """Run one case in this process, without limits, and let its exception pass."""
    module = importlib.import_module(f"fuzz.{fuzzer}")
    case = next(islice(module.cases(seed, count), index, None))
    print(case.description)
    with tempfile.TemporaryDirectory() as folder:
        case.run(Path(folder))


def _run_worker(report: Report, seed: int, count: int, done: int, root: Path) -> int:
    """Run cases from number `done` on in one worker, until all are run or it has to be replaced; return the next."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(report.fuzzer, seed, count, done, root, sender), daemon=True)
    worker.start()
    sender.close()  # so that the end of the worker is seen here
    description, running = "before the first case", False
    try:
        while done < count:
            if not receiver.poll(SECONDS if running else START_SECONDS):
                report.add(done, description, HANG, "")
                return done + 1
            try:
                message = receiver.recv()
            except EOFError:
                worker.join()
                code = worker.exitcode or 0
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                report.add(done, description, CRASH, how)
                return done + 1
            if isinstance(message, BaseException):
                raise message  # the fuzzer's own mistake
            if running := isinstance(message, str):
                description = message
            else:
                report.add(done, description, *message)
                done += 1
        return done
    finally:
        worker.kill()
        worker.join()
        receiver.close()


def _work(fuzzer: str, seed: int, count: int, done: int, root: Path, sender: Connection) -> None:
    """Run cases in the worker: send each one's description, then its outcome, details and memory."""
    try:
        _send_outcomes(fuzzer, seed, count, done, root, sender)
    except BaseException:  # noqa: BLE001 - not from a case: sent, so that the run ends
        sender.send(RuntimeError(f"the fuzzer {fuzzer} is broken:\n{traceback.format_exc()}"))


def _send_outcomes(fuzzer: str, seed: int, count: int, done: int, root: Path, sender: Connection) -> None:
    module = importlib.import_module(f"fuzz.{fuzzer}")
    # Not even a case without bounds must take the machine down. Threads reserve more address space than they use.
    resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + (16 << 30), resource.RLIM_INFINITY))
    for index, case in enumerate(islice(module.cases(seed, count), done, None), done):
        folder = root / str(index)
        folder.mkdir()
        sender.send(case.description)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = _status_bytes("VmRSS")
        outcome, details = _outcome(module, case, folder)
        peak = _status_bytes("VmHWM") - before
        if peak > MEMORY_BYTES and outcome not in FAILURES:
            outcome, details = MEMORY, f"{peak >> 20} MB"
        sender.send((outcome, details, peak))
        shutil.rmtree(folder, ignore_errors=True)


def _outcome(module: ModuleType, case: Case, folder: Path) -> tuple[str, str]:
    try:
        case.run(folder)
    except DifferentError as error:
        return DIFFERENT, str(error)
    except Exception as error:  # noqa: BLE001 - whatever else comes is what is looked for
        by_accident = isinstance(error, UnicodeError | json.JSONDecodeError)
        if isinstance(error, module.DOCUMENTED) and not by_accident:
            return REFUSED, ""
        return UNDOCUMENTED, traceback.format_exc()
    return EQUAL, ""


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))
