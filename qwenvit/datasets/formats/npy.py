"""Shards of vectors as one numpy array, `[rows, width]` float32; the index beside the shard says which row is which."""

from typing import BinaryIO

from qwenvit.datasets.formats.tensor_bytes import bytes_of
from qwenvit.datasets.item import EncodedItem, ShardLayout

HEAD_BYTES = 128
"""The header has the number of rows, so it is written last, over this many bytes."""


class NpyShard:
    """Writes vectors; see `ShardWriter`. The format is version 1.0 of numpy's `.npy`."""

    is_full = False

    def __init__(self, stream: BinaryIO, layout: ShardLayout) -> None:  # noqa: ARG002 as all writers
        self._stream = stream
        self._rows = self._width = self.num_bytes = 0
        stream.write(bytes(HEAD_BYTES))

    def add(self, item: EncodedItem) -> None:
        """Write the vector of an item."""
        if item.pooled is None:
            raise ValueError(f"{item.record.id}: expected a vector, got none")
        self._stream.write(bytes_of(item.pooled))
        self._rows, self._width = self._rows + 1, len(item.pooled)
        self.num_bytes += item.pooled.nbytes

    def finish(self) -> None:
        """Write the header."""
        array = {"descr": "<f4", "fortran_order": False, "shape": (self._rows, self._width)}
        start = b"\x93NUMPY\x01\x00" + (HEAD_BYTES - 10).to_bytes(2, "little")
        self._stream.seek(0)
        self._stream.write(start + repr(array).encode().ljust(HEAD_BYTES - 11) + b"\n")
