"""Lines for a terminal, a file or a pipe: nothing in a name can harm them, and nothing that happens to them a job."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO


def printable(text: str) -> str:
    r"""Return a text in one line: control characters, line breaks and marks that reorder text become \-escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text)


def one_line(error: BaseException) -> str:
    """Return an error's message in one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def make_lenient(stream: TextIO) -> None:
    """Let a stream escape what its encoding does not have: a terminal need not know UTF-8."""
    reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def say(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Write a line; a reader that has gone away, as `head` does, or a full disk is no reason to stop."""
    stream = sys.stdout if stream is None else stream
    try:
        stream.write(text + end)
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream is closed
        silence(stream)


def silence(stream: TextIO) -> None:
    """Send a broken stream's output nowhere, so that Python can flush it when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
