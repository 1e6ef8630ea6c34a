"""Show the progress of a benchmark in one line on stderr."""

import sys


def progress(text: str) -> None:
    """Replace the line of progress on stderr."""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
