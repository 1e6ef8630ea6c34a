"""Markdown that benchmarks write: tables, and the block of a page between its two markers."""

from collections.abc import Iterable
from pathlib import Path


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


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
