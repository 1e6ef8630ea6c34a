"""Shards in safetensors: `ID/tokens` and `ID/deepstack.K` of each row, and the vectors of all rows as `pooled`.

The metadata are those of `qwenvit.embedding_file`, so `qwenvit.load_embeddings` reads a shard; `grids` has the ids in
the order of the rows of `pooled`. `settings` has what the job was started with.
"""

import io
import json
from dataclasses import asdict
from typing import Any, BinaryIO

from torch import Tensor

from qwenvit.datasets.formats.tensor_bytes import bytes_of
from qwenvit.datasets.item import EncodedItem, ShardLayout
from qwenvit.weights.header import FLOAT_DTYPES, MAX_HEADER_BYTES

FIRST_RESERVE = 4096
"""Bytes kept for the header while it is unknown: it comes first in the file, and says where every tensor is."""
RESERVE_GROWTH = 8
"""How many times as much is kept, at least, when a header does not fit. What is written is then moved."""
SHARD_BYTES = 2**30
"""Of the tensors of a usual shard. So much room is kept that its header fits, if it grows on as before."""
ALIGNMENT = 64
"""Tensors start at multiples of it in the file, if their sizes are multiples of it too: readers map the file."""
FULL_HEADER_BYTES = MAX_HEADER_BYTES // 4
"""A longer header takes no further row: readers refuse headers above a limit."""
BLOCK = 2**24
_DTYPE_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


class SafetensorsShard:
    """Writes tensors as they come, and the header over the bytes that were kept for it; see `ShardWriter`."""

    def __init__(self, stream: BinaryIO, layout: ShardLayout) -> None:
        self._stream, self._layout = stream, layout
        self.num_bytes = 0
        self._entries: list[str] = []
        self._grids: dict[str, tuple[int, int, int]] = {}
        self._times: dict[str, dict[str, Any] | None] = {}
        self._vectors = io.BytesIO()
        self._vector_width = 0
        self._written = 0  # bytes of tensors in the stream
        self._header_bytes = len(self._header())
        self._reserve = FIRST_RESERVE
        stream.write(bytes(self._reserve))

    @property
    def is_full(self) -> bool:
        """Whether readers could refuse a longer header."""
        return self._header_bytes > FULL_HEADER_BYTES

    def add(self, item: EncodedItem) -> None:
        """Write the tokens of an item, and keep its vector."""
        identifier = item.record.id
        if self._layout.has_tokens:
            if item.tokens is None:
                raise ValueError(f"{identifier}: expected tokens, got none")
            self._add_tensor(f"{identifier}/tokens", item.tokens)
            for level, layer in enumerate(item.deepstack):
                self._add_tensor(f"{identifier}/deepstack.{level}", layer)
        if self._layout.has_pooled:
            if item.pooled is None:
                raise ValueError(f"{identifier}: expected a vector, got none")
            # Vectors are one tensor. Where there are tokens too, they follow them.
            self._vector_width = len(item.pooled)
            vector = bytes_of(item.pooled)
            if self._layout.has_tokens:
                self._vectors.write(vector)
            else:
                self._write(vector)
            self.num_bytes += item.pooled.nbytes
        self._grids[identifier] = item.grid
        described = [json.dumps({identifier: item.grid})]
        if item.is_video:
            self._times[identifier] = asdict(item.times) if item.times else None
            described.append(json.dumps({identifier: self._times[identifier]}))
        # The metadata are JSON inside JSON: quotes and backslashes are escaped twice.
        self._header_bytes += len(json.dumps(described))
        while self._header_bytes > self._reserve - 8:
            self._grow()

    def finish(self) -> None:
        """Write the vectors and the header."""
        vectors = self._vectors.getvalue()
        if self._layout.has_pooled:
            if padding := -self._written % 4:  # every tensor must be aligned to its elements
                self._entries.append(_entry("padding", "U8", (padding,), self._written, padding))
                self._write(bytes(padding))
            size = 4 * len(self._grids) * self._vector_width
            shape = (len(self._grids), self._vector_width)
            start = self._written if self._layout.has_tokens else 0
            self._entries.append(_entry("pooled", "F32", shape, start, size))
            self._write(vectors)
        header = self._header()
        while len(header) > self._reserve - 8:  # twice only if that is more than a header may have, which is refused
            self._move(len(header) + 8)
        self._stream.seek(0)
        self._stream.write((self._reserve - 8).to_bytes(8, "little") + header.ljust(self._reserve - 8))
        self._stream.seek(0, io.SEEK_END)

    def _add_tensor(self, name: str, tensor: Tensor) -> None:
        self._entries.append(
            _entry(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), self._written, tensor.nbytes)
        )
        self._header_bytes += len(self._entries[-1]) + 1
        self._write(bytes_of(tensor))
        self.num_bytes += tensor.nbytes

    def _write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._written += len(data)

    def _header(self) -> bytes:
        layout = self._layout
        metadata = {
            "format": "pt",
            "grids": json.dumps(self._grids),
            "times": json.dumps(self._times),
            "config": json.dumps(layout.config.to_hf()),
            "model": json.dumps(layout.model),
            "settings": json.dumps({key: json.loads(value) for key, value in layout.metadata.items()}),
        }
        fields = [f'"__metadata__":{json.dumps(metadata)}', *self._entries]
        return f"{{{','.join(fields)}}}".encode()

    def _grow(self) -> None:
        """Keep more for the header.

        After a small part of a shard the header's length at its end is foreseen, so that no large part is moved. An
        eighth of what is written may be kept in vain.
        """
        foreseen = self._header_bytes * SHARD_BYTES // max(self._written, 1)
        self._move(max(self._reserve * RESERVE_GROWTH, min(foreseen + foreseen // 4, self._written // 8)))

    def _move(self, reserve: int) -> None:
        """Move the tensors up, so that a header of about this length fits in front of them."""
        start, self._reserve = self._reserve, min(-(-reserve // ALIGNMENT) * ALIGNMENT, 2 * FULL_HEADER_BYTES)
        if self._reserve <= start:
            raise ValueError(f"expected a header of at most {start} bytes, got one of {self._header_bytes}")
        for end in range(self._written, 0, -BLOCK):  # from the end, since they overlap
            first = max(0, end - BLOCK)
            self._stream.seek(start + first)
            block = self._stream.read(end - first)
            self._stream.seek(self._reserve + first)
            self._stream.write(block)
        self._stream.seek(self._reserve + self._written)


def _entry(name: str, dtype: str, shape: tuple[int, ...], start: int, num_bytes: int) -> str:
    fields = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + num_bytes]}
    return f"{json.dumps(name)}:{json.dumps(fields)}"
