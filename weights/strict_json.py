"""JSON from files that others made: read only if it means one thing.

Python's `json` accepts what other parsers refuse or read otherwise: a repeated key (the last value counts), NaN,
UTF-16, half of a surrogate pair. Two programs could then see two checkpoints in one file.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from qwenvit.weights.regular_file import open_regular

MAX_BYTES = 50_000_000
"""The largest file that is read. An index has about 100 bytes a tensor, a config a few thousand in all."""

MAX_VALUES = 8_000_000
"""How many values a text may have: a header of a million tensors has as many. They take about 1 GB."""

MAX_DEPTH = 64
"""How deep arrays and objects may be nested. Configs and headers have fewer than ten levels."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, source: str | Path, finite: bool = True) -> Any:
    """Return the value that a JSON text describes.

    Integers that do not fit into 64 bits become floats, as in most parsers.

    Args:
        data: the text; callers bound its length.
        source: where it came from, for messages.
        finite: refuse NaN and infinities, which Python writes in configs and JSON does not have.

    Raises:
        ValueError: `data` is not JSON by RFC 8259 in UTF-8 without a byte order mark, repeats a key, has half of a
            surrogate pair or (if `finite`) a number beyond float64, or exceeds `MAX_VALUES` or `MAX_DEPTH`. The
            message names `source` and the place.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: expected JSON in UTF-8, got other bytes from byte {error.start} on") from None
    if text.startswith("\ufeff"):
        raise ValueError(f"{source}: expected JSON without a byte order mark, got one at byte 0")
    _check_extent(data, source)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite if finite else float,
            parse_constant=_no_constant if finite else float,
        )
    except ValueError as error:
        raise ValueError(f"{source}: expected JSON: {error}") from None
    if _SURROGATE.search(data):  # half of a pair can only be written as an escape
        _check_surrogates(value, source)
    return value


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, has more than `MAX_BYTES`, or is not the JSON of an object, see
            `parse_json`. NaN and infinities are read: language models' configs may have them.
    """
    with open_regular(file) as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file}: expected JSON of at most {MAX_BYTES} bytes, got a larger file")
    return parse_object(data, file, finite=False)


def parse_object(data: bytes, source: str | Path, finite: bool = True) -> dict[str, Any]:
    """Return what `parse_json` does if that is an object; ValueError if it is another value."""
    value = parse_json(data, source, finite)
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def _check_extent(data: bytes, source: str | Path) -> None:
    """Refuse what would take much memory or a deep recursion to parse."""
    # Each value but the first follows a comma or an opening bracket. Those in strings count too: an upper bound.
    opening = data.count(b"[") + data.count(b"{")
    values = 1 + opening + data.count(b",")
    if values > MAX_VALUES:
        raise ValueError(f"{source}: expected JSON of at most {MAX_VALUES} values, got up to {values}")
    if opening <= MAX_DEPTH:
        return
    brackets = _STRING.sub(b"", data).translate(None, delete=_ALL_BUT_BRACKETS)
    # The low four bits are 11 in [ and {, 13 in ] and }.
    steps = 12 - (np.frombuffer(brackets, np.uint8) & 15).astype(np.int32)
    depth = int(steps.cumsum(dtype=np.int32).max(initial=0))
    if depth > MAX_DEPTH:
        raise ValueError(f"{source}: expected JSON nested at most {MAX_DEPTH} levels deep, got {depth}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"each key of an object once, got {key[:100]!r} twice")
            seen.add(key)
    return result


def _integer(digits: str) -> int | float:
    # Integers have no negative zero. Python converts no more than some thousand digits, and takes long for these.
    if len(digits) > 20 or digits == "-0":
        return _finite(digits)
    value = int(digits)
    return value if -(2**63) <= value < 2**64 else float(value)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"numbers within float64, got {digits[:40]}")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"got {name}, which is no JSON")


def _check_surrogates(value: Any, source: str | Path) -> None:
    if isinstance(value, dict):
        _check_surrogates([*value, *value.values()], source)
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item, source)
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{source}: expected Unicode text, got half of a surrogate pair in {value[:100]!r}")
