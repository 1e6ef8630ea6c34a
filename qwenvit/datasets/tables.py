"""Parquet files with a column of images: encoded bytes, paths, or the struct that Hugging Face's datasets write."""

import os
from collections.abc import Iterator
from typing import Any

from qwenvit.datasets.record import Bytes, Content, Record, Unusable, WholeFile, make_record, reason_of, stamp_of

SUFFIX = ".parquet"
ROWS_PER_READ = 16
"""Rows in memory at a time: a photograph may have several megabytes."""


class ColumnError(ValueError):
    """A table has no column of images, or several: a mistake in the arguments rather than a broken file."""


def import_parquet() -> Any:
    """Return pyarrow's module for parquet.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'qwenvit[parquet]'") from error
    return pyarrow.parquet


def count_rows(file: str, column: str | None) -> int | None:
    """Return the number of rows, or None for a table without a column of images.

    Raises:
        ImportError: pyarrow is not installed.
        ColumnError: `column` is not in the table or has no images, or there are several to choose from.
        ValueError: not a parquet file.
        OSError: the file cannot be read.
    """
    with import_parquet().ParquetFile(file) as table:
        return table.metadata.num_rows if image_column(table.schema_arrow, file, column) is not None else None


def is_shard(file: str) -> bool:
    """Whether a table is a shard that a job has written: its tokens are bytes, but no images.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: not a parquet file.
        OSError: the file cannot be read.
    """
    with import_parquet().ParquetFile(file) as table:
        return {b"config", b"model", b"settings"} <= (table.schema_arrow.metadata or {}).keys()


def image_column(schema: Any, file: str, column: str | None) -> str | None:
    """Return the name of a table's column of images.

    Args:
        schema: the table's Arrow schema.
        file: the table, for error messages.
        column: the column to take. None: the one with encoded images, or of several the one called `image`. A column of
            paths is taken only if it is named.

    Returns:
        None if no column has encoded images.

    Raises:
        ColumnError: no such column, one of another type, or several to choose from.
    """
    if column is not None:
        index = schema.get_field_index(column)
        if index < 0:
            raise ColumnError(f"image_column: expected one of {', '.join(schema.names)} ({file}), got {column!r}")
        if not (_has_bytes(schema.field(index).type) or _is_text(schema.field(index).type)):
            kind = schema.field(index).type
            raise ColumnError(
                f"image_column: expected bytes, paths or struct<bytes, path> ({file}), got {column!r} of type {kind}"
            )
        return column
    candidates = [field.name for field in schema if _has_bytes(field.type)]
    if len(candidates) > 1 and "image" not in candidates:
        raise ColumnError(f"image_column: expected the name of one of {', '.join(candidates)} ({file}), got None")
    return "image" if "image" in candidates else candidates[0] if candidates else None


def read_table(file: str, name: str, column: str | None, verify: bool) -> Iterator[Record]:
    """Yield the rows of a table, a few in memory at a time.

    Args:
        file: the table.
        name: its id; a row's is `name/number`, counted from 0.
        column: the column of images, as in `image_column`.
        verify: make stamps from the images' hashes.
    """
    parquet = import_parquet()
    row, table_stamp = 0, "unreadable"
    try:
        table_stamp = stamp_of(file)
        # Otherwise a whole row group would be read at once, rather than its pages one by one.
        with parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as table:
            chosen = image_column(table.schema_arrow, file, column)
            for batch in table.iter_batches(ROWS_PER_READ, columns=[chosen]):
                for cell in batch.column(0):
                    content, stamp = _content(cell.as_py(), file, f"{table_stamp}-{row}")
                    yield make_record(f"{name}/{row}", f"{file}/{row}", stamp, content, verify=verify)
                    row += 1
    except (OSError, ValueError, NotImplementedError) as error:  # bases of pyarrow's own
        reason = f"broken table, of which {row} rows were read: {reason_of(error)}"
        yield make_record(name, file, table_stamp, Unusable(reason), verify=verify)


def _content(cell: Any, table: str, stamp: str) -> tuple[Content, str]:
    """Return the image of a cell, and its stamp."""
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytes):
        return Bytes(cell), stamp
    if not isinstance(cell, str) or not cell:
        return Unusable("the row has no image"), stamp
    file = os.path.join(os.path.dirname(table), cell)
    try:
        return WholeFile(file), stamp_of(file)
    except (OSError, ValueError) as error:
        return Unusable(f"{cell!r}: {reason_of(error)}"), stamp


def _has_bytes(kind: Any) -> bool:
    """Whether a type is that of encoded images: binary, or a struct with a binary field `bytes`."""
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _has_bytes(kind.field(index).type)
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or (hasattr(types, "is_binary_view") and types.is_binary_view(kind))
    )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or (hasattr(types, "is_string_view") and types.is_string_view(kind))
    )
