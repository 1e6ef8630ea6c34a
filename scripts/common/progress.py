"""The line on stderr that says how far a benchmark is."""

import sys


def progress(text: str) -> None:
    """Replace the line of progress on stderr."""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
