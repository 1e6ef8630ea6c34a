"""Patterns of an adapter's config (`alpha_pattern`, `rank_pattern`): which value a module has.

The keys are regular expressions from a file that anyone may have made, and Python's may take for ever. Only patterns
whose time is known to be short are matched.
"""

import re
from collections.abc import Mapping
from typing import Any

# One character or one kind of character, once or repeated; groups of alternatives, not repeated.
_ITEM = r"(?:[^\\\[\](){}|*+?]|\\[.\-dw]|\[[^\[\]\\]+\])"
_ALLOWED = re.compile(rf"(?:{_ITEM}[*+?]?\??|\((?:\?:)?{_ITEM}*(?:\|{_ITEM}*)*\)|\|)*")
# About a second of matching, for all patterns and modules of an adapter.
_MAX_STEPS = 10**8


def check_patterns(patterns: Mapping[str, Any], modules: int, longest: int) -> None:
    """Refuse patterns that could take long to match against `modules` paths of at most `longest` characters.

    Raises ValueError with the pattern.
    """
    total = 0
    for pattern in patterns:
        if len(pattern) > 1000 or not _ALLOWED.fullmatch(pattern):
            raise ValueError(f"expected names of modules or simple patterns of them, got {pattern[:200]!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"expected names of modules or patterns of them, got {pattern[:200]!r}: {error}") from None
        bare = re.sub(r"\\.|\[[^\]]+\]", "x", pattern)
        repeats, choices = bare.count("*") + bare.count("+"), bare.count("|") + bare.count("?")
        # One repeat more: peft lets any path of modules come before the pattern.
        total += modules * longest ** (1 + repeats) * 2**choices
        if total > _MAX_STEPS:
            raise ValueError(f"expected patterns that are quick to match, got too many or {pattern[:200]!r}")


def compile_patterns(patterns: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Any]]:
    """Return the patterns for `value_for`, in order: Python keeps fewer compiled ones than an adapter may have."""
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]


def value_for(path: str, patterns: list[tuple[re.Pattern[str], Any]], default: Any) -> Any:
    """Return the value of the first pattern that matches a module's path, as peft does: the whole path or its end."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)
