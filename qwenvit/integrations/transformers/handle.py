"""The handle of a replacement in a loaded model."""

from collections.abc import Callable
from typing import Self


class Handle:
    """Undo a replacement: `remove()`, or leaving a `with` block.

    Args:
        undo: puts back what was replaced.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Put back what was replaced; a second call does nothing."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
