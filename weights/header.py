"""The header of a safetensors file, parsed and checked against the file's size before any tensor is read.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length, that many bytes of
JSON with each tensor's dtype, shape and byte range, then the tensors without gaps.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    Raises ValueError if `text` is not such JSON, leaves gaps between tensors, or implies a different file size.
    """
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _parse_entry(fields, file, 8 + len(text)) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a safetensors file: unreadable header ({error!r})") from error
    position = 8 + len(text)
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ValueError(f"{file}: broken header: expected {name} to start at byte {position}, got {entry.start}")
        position = entry.end
    if file_size is not None and file_size != position:
        what = "truncated" if file_size < position else "too long"
        raise ValueError(f"{file}: {what}: expected {position} bytes by its header, got {file_size}")
    return entries


def _parse_entry(fields: dict[str, Any], file: Path, data_start: int) -> TensorEntry:
    dtype, shape = fields["dtype"], tuple(fields["shape"])
    start, end = fields["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"shape {shape} and data_offsets [{start}, {end}] must be non-negative integers")
    # A dtype newer than this table is an error only for the code that reads the tensor.
    if dtype in _DTYPE_BITS and (end - start) * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
        raise ValueError(f"{dtype} of shape {shape} cannot take {end - start} bytes")
    return TensorEntry(file, dtype, shape, data_start + start, data_start + end)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return every tensor of the safetensors `file` by name; only the header is read.

    Raises ValueError if the file is truncated or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = header_length(stream.read(8), file, size)
        return parse_header(stream.read(length), file, size)


def build_header(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the header (length and JSON) of a file with these tensors, and the byte at which each tensor starts.

    Wider dtypes come first, so that every tensor is aligned to its element size. Tensors of equal width keep the
    order of their files and offsets, so that neighbours can be downloaded in one request.
    """

    def file_order(name: str) -> tuple[int, Path, int]:
        return -_DTYPE_BITS.get(entries[name].dtype, 0), entries[name].file, entries[name].start

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
