"""One mistake that `mutate.py` makes, and the tests that should notice it."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change: `before` occurs once in `function` of `file`, and becomes `after`."""

    file: str
    function: str
    before: str
    after: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        change = f"{' '.join(self.before.split())} -> {' '.join(self.after.split())}"
        return f"{self.file} {self.function}: {change}"


def mutants(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    """Return mutants of a file, (function, before, after) each, which the test files named in `tests` should notice."""
    return [Mutant(file, *change, tuple(tests.split())) for change in changes]
