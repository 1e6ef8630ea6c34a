"""Shards in Parquet: a row for each image or video.

| column | type | |
|---|---|---|
| `id`, `path` | string | what names the input, and where it was found |
| `grid` | 3 × int32 | frame groups, rows and columns of tokens |
| `num_tokens` | int32 | |
| `is_video`, `timestamps`, `second_per_grid` | | of videos: seconds of each frame group, and from one to the next |
| `pooled` | width × float32 | the vector |
| `tokens` | large_binary | `[num_tokens, -1]`, little-endian, in the dtype of `tokens_dtype`: Parquet has no bfloat16 |
| `deepstack` | list of large_binary | the same for each DeepStack level |
| `tokens_dtype` | string | `bfloat16`, `float16` or `float32` |

The schema's metadata have the tower's `config`, the `model` and the job's `settings` as JSON.
"""

import json
from dataclasses import asdict
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from qwenvit.datasets.formats.tensor_bytes import bytes_of
from qwenvit.datasets.item import EncodedItem, ShardLayout

ROW_GROUP_BYTES = 64 * 2**20
"""Tensors of a row group; so many bytes are kept in memory before they are written."""
ROW_GROUP_ROWS = 10_000


def schema_of(layout: ShardLayout, vector_width: int) -> pa.Schema:
    """Return the columns of a shard whose vectors have `vector_width` channels."""
    fields = [
        ("id", pa.string()),
        ("path", pa.string()),
        ("grid", pa.list_(pa.int32(), 3)),
        ("num_tokens", pa.int32()),
        ("is_video", pa.bool_()),
        ("timestamps", pa.list_(pa.float64())),
        ("second_per_grid", pa.float64()),
    ]
    if layout.has_pooled:
        fields.append(("pooled", pa.list_(pa.float32(), vector_width)))
    if layout.has_tokens:
        fields += [("tokens", pa.large_binary()), ("deepstack", pa.list_(pa.large_binary()))]
        fields.append(("tokens_dtype", pa.string()))
    settings = {key: json.loads(value) for key, value in layout.metadata.items()}
    described = {"config": layout.config.to_hf(), "model": layout.model, "settings": settings}
    return pa.schema(fields, {key: json.dumps(value) for key, value in described.items()})


def row_of(item: EncodedItem, layout: ShardLayout) -> dict[str, Any]:
    """Return an item as a row of `schema_of`, with copies of its tensors."""
    row: dict[str, Any] = {
        "id": item.record.id,
        "path": item.record.path,
        "grid": item.grid,
        "num_tokens": item.num_tokens,
        "is_video": item.is_video,
    }
    row |= asdict(item.times) if item.times else {"timestamps": None, "second_per_grid": None}
    if layout.has_pooled:
        if item.pooled is None:
            raise ValueError(f"{item.record.id}: expected a vector, got none")
        row["pooled"] = item.pooled.numpy().copy()
    if layout.has_tokens:
        if item.tokens is None:
            raise ValueError(f"{item.record.id}: expected tokens, got none")
        row["tokens"] = bytes(bytes_of(item.tokens))
        row["deepstack"] = [bytes(bytes_of(layer)) for layer in item.deepstack]
        row["tokens_dtype"] = str(item.tokens.dtype).removeprefix("torch.")
    return row


class ParquetShard:
    """Writes row groups; see `ShardWriter`."""

    is_full = False

    def __init__(self, stream: BinaryIO, layout: ShardLayout) -> None:
        self._stream, self._layout = stream, layout
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []
        self.num_bytes = self._bytes_written = 0

    def add(self, item: EncodedItem) -> None:
        """Keep a row, and write those that make a row group."""
        self._rows.append(row_of(item, self._layout))
        self.num_bytes += item.num_bytes
        if self.num_bytes - self._bytes_written >= ROW_GROUP_BYTES or len(self._rows) == ROW_GROUP_ROWS:
            self._write_group()

    def finish(self) -> None:
        """Write the last row group and the footer."""
        if self._rows:
            self._write_group()
        if self._writer is not None:
            self._writer.close()

    def _write_group(self) -> None:
        if self._writer is None:
            width = len(self._rows[0]["pooled"]) if self._layout.has_pooled else 0
            schema = schema_of(self._layout, width)
            self._writer = pq.ParquetWriter(
                self._stream,
                schema,
                use_dictionary=["tokens_dtype"],
                compression={"id": "zstd", "path": "zstd"},  # features hardly compress
                write_statistics=["id", "path"],
            )
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._writer.schema))
        self._rows, self._bytes_written = [], self.num_bytes
