"""How far a job is, in one line that is overwritten on a terminal, and once a minute elsewhere."""

import shutil
import sys
import time
from collections import deque

from qwenvit.cli.terminal import say
from qwenvit.datasets.progress import Progress

SECONDS_OF_RATE = 30.0
"""Rates are those of so many seconds: the first seconds of a job, and those of other inputs, say little."""
SECONDS_BETWEEN_LINES = 60.0
CLEAR_LINE = "\r\x1b[K"


class ProgressLine:
    """Shows the progress of a job on standard error."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._past: deque[Progress] = deque()
        self._shown = ""
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __call__(self, progress: Progress) -> None:
        """Show a job's progress."""
        self._past.append(progress)
        while len(self._past) > 2 and self._past[1].seconds < progress.seconds - SECONDS_OF_RATE:
            self._past.popleft()
        text = describe(progress, self._past[0])
        if self._is_terminal:
            self._shown = text[: shutil.get_terminal_size().columns - 1]
            say(CLEAR_LINE + self._shown, sys.stderr, end="")
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            say(text, sys.stderr)

    def clear(self) -> None:
        """Make place for another line; the next progress comes below it."""
        if self._shown:
            say(CLEAR_LINE, sys.stderr, end="")
            self._shown = ""


def describe(now: Progress, before: Progress) -> str:
    """Return a job's progress in words, with the rates since `before`; of a single report, since the start."""
    done = now.skipped + now.encoded + now.failed
    counts = [f"{done:,} of {now.expected:,} images" if now.expected is not None else f"{done:,} images"]
    seconds, here, tokens = now.seconds, now.encoded + now.failed, now.tokens
    if before.seconds < now.seconds:
        seconds, here, tokens = (
            seconds - before.seconds,
            here - before.encoded - before.failed,
            tokens - before.tokens,
        )
    if seconds > 0 and here > 0:
        rate = here / seconds
        counts += [
            f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s",
            f"{tokens / seconds:,.0f} tokens/s",
        ]
        if now.expected is not None:
            counts.append(f"ETA {duration(max(now.expected - done, 0) / rate)}")
        counts.append(f"device waits {now.waiting:.0%}")
    if now.failed:
        counts.append(f"{now.failed:,} failed")
    return ", ".join(counts)


def duration(seconds: float) -> str:
    """Return a time as `MM:SS`, `H:MM:SS` or with days."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
    return f"{hours // 24} d {hours % 24} h"
