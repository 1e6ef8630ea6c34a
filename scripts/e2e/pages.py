"""Rewrite the block of a markdown page between its two markers."""

from pathlib import Path

TOWERS_MARKERS = ("<!-- bench_e2e.py: begin -->", "<!-- bench_e2e.py: end -->")
"""Around all figures of whole towers, in BENCHMARKS.md."""
SPEED_MARKERS = ("<!-- speed: begin -->", "<!-- speed: end -->")
"""Around the short table of speedups, in the README."""


def rewrite(page: Path, markers: tuple[str, str], text: str) -> None:
    """Put a text between the two markers of a page.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    begin, end = markers
    before, found_begin, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or begin in after or end in after:
        raise ValueError(f"{page}: expected one {begin} and then one {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
