"""The header of a safetensors file, parsed and checked against the file's size before any tensor is read.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length, that many bytes of
JSON with each tensor's dtype, shape and byte range, then the tensors without gaps.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenvit.weights.regular_file import open_regular
from qwenvit.weights.strict_json import parse_json

# The format's own limit; a file that gives a greater length is not a safetensors file.
MAX_HEADER_BYTES = 100_000_000

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, stored in bytes `start` to `end` (exclusive, from the file's beginning) of `file`."""

    file: Path
    dtype: str  # as safetensors spells it, e.g. "BF16"
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """The tensor's size in the file, in bytes."""
        return self.end - self.start


def header_length(head: bytes, file: Path, file_size: int | None) -> int:
    """Return the length in bytes of the JSON header of `file`, from the file's first 8 bytes `head`.

    `file_size` is the file's size in bytes (None: unknown, not checked).
    Raises ValueError if the file is truncated or not a safetensors file.
    """
    if len(head) < 8:
        raise ValueError(f"{file}: truncated: expected at least 8 bytes, got {len(head)}")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{file}: not a safetensors file: its first 8 bytes give a header of {length} bytes, "
            f"more than the format's limit of {MAX_HEADER_BYTES}"
        )
    if file_size is not None and 8 + length > file_size:
        raise ValueError(
            f"{file}: truncated: expected a header up to byte {8 + length}, got a file of {file_size} bytes"
        )
    return length


def parse_header(text: bytes, file: Path, file_size: int | None) -> dict[str, TensorEntry]:
    """Return every tensor of `file` by name, from the JSON `text` of its header.

    `file_size` is the file's size in bytes (None: unknown, not checked).

    Whatever safetensors' own reader refuses is refused here, and what the format's description forbids although that
    reader takes it: repeated names, white space before the first brace, entries and dtypes written in other forms.

    Raises ValueError if `text` is not such JSON, leaves gaps between tensors, or implies a different file size.
    """
    source = f"{file}: broken header"
    if not text.startswith(b"{"):
        raise ValueError(f"{source}: not a safetensors file: expected a JSON object, got {text[:20]!r}")
    header = parse_json(text, source)
    _check_metadata(header.pop("__metadata__", None), source)
    data_start = 8 + len(text)
    entries = {}
    for name, fields in header.items():
        try:
            entries[name] = _parse_entry(fields, file, data_start)
        except ValueError as error:
            raise ValueError(f"{source}: {name[:200]!r}: {error}") from None
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ValueError(f"{source}: expected {name[:200]!r} to start at byte {position}, got {entry.start}")
        position = entry.end
    if file_size is not None and file_size != position:
        what = "truncated" if file_size < position else "too long"
        raise ValueError(f"{file}: {what}: expected {position} bytes by its header, got {file_size}")
    return entries


def _check_metadata(metadata: Any, source: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise ValueError(f"{source}: __metadata__: expected an object of strings, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(f"{source}: __metadata__: {key[:200]!r}: expected a string, got {str(value)[:100]}")


def _parse_entry(fields: Any, file: Path, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict) or not fields.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"expected an object with dtype, shape and data_offsets, got {str(fields)[:100]}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPE_BITS)}, got {str(dtype)[:100]!r}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        # `type`, since booleans are integers too. No number is above 64 bits: parse_json makes those floats.
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{key}: expected a list of non-negative 64-bit integers, got {str(numbers)[:100]}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets: expected where the tensor starts and ends, got {str(offsets)[:100]}")
    bits = 1
    for factor in (*shape, _DTYPE_BITS[dtype]):
        bits *= factor
        if bits >= 2**64:  # also before a later 0, as in safetensors' own reader
            raise ValueError(f"shape: expected a size that 64 bits can count, got {str(shape)[:100]}")
    start, end = offsets
    if (end - start) * 8 != bits:
        raise ValueError(f"{dtype} of shape {str(shape)[:100]} cannot take {end - start} bytes")
    return TensorEntry(file, dtype, tuple(shape), data_start + start, data_start + end)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the safetensors `file` by name; only the header is read.

    Raises OSError if the file cannot be read, and ValueError if it is not a regular file, is truncated or is not a
    safetensors file.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = header_length(stream.read(8), file, size)
        return parse_header(stream.read(length), file, size)


def build_header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the header (length and JSON) of a file with these tensors, and the byte at which each tensor starts.

    Wider dtypes come first, so that every tensor is aligned to its element size. Tensors of equal width keep the
    order of their files and offsets, so that neighbours can be downloaded in one request.
    """

    def file_order(name: str) -> tuple[int, Path, int]:
        return -_DTYPE_BITS[entries[name].dtype], entries[name].file, entries[name].start

    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, position = {}, 0  # from the end of the header
    for name in sorted(entries, key=file_order):
        entry = entries[name]
        offsets[name] = position
        position += entry.nbytes
        fields[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offsets[name], position]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}
