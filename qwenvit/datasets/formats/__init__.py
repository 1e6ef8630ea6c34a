"""Formats of shards: each is one writer, which puts rows into a stream as they come."""

from importlib import import_module
from typing import BinaryIO, Protocol

from qwenvit.datasets.item import EncodedItem, ShardLayout

SUFFIXES = {"safetensors": ".safetensors", "parquet": ".parquet", "npy": ".npy"}
"""The formats, and what the names of their files end in."""


class ShardWriter(Protocol):
    """Writes one shard. Equal rows give equal bytes."""

    def __init__(self, stream: BinaryIO, layout: ShardLayout) -> None: ...

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensors that were added."""

    @property
    def is_full(self) -> bool:
        """Whether the format takes no further row in this file."""

    def add(self, item: EncodedItem) -> None:
        """Write a row, or keep a copy of it: its tensors may be overwritten after the call.

        Raises:
            OSError: the stream cannot be written.
        """

    def finish(self) -> None:
        """Write the rest, so that the stream has the whole file, which has at least one row; do not close the stream.

        Raises:
            OSError: the stream cannot be written.
        """


def check_format(format: str, has_tokens: bool, has_pooled: bool) -> None:  # noqa: A002 as users write it
    """Check that a format can be written here with what a job puts into it.

    Raises:
        ValueError: an unknown format; neither tokens nor vectors; `npy` with tokens, or without vectors.
        ImportError: a package that the format needs is not installed.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format: expected one of {', '.join(SUFFIXES)}, got {format!r}")
    if not has_tokens and not has_pooled:
        raise ValueError("tokens: expected True where pool is None, since the output would be empty; got False")
    if format == "npy" and (has_tokens or not has_pooled):
        raise ValueError("format: 'npy' has vectors only: pass pool='mean' or 'patches', and tokens=False")
    if format == "parquet":
        try:
            import_module("pyarrow")
        except ImportError as error:
            raise ImportError("format: 'parquet' needs pyarrow: pip install 'qwenvit[parquet]'") from error


def open_writer(format: str, stream: BinaryIO, layout: ShardLayout) -> ShardWriter:  # noqa: A002
    """Return a writer of a shard.

    Args:
        format: a key of `SUFFIXES`, which `check_format` has accepted.
        stream: an empty file, readable, writable and seekable.
        layout: what the rows have in common.
    """
    if format == "parquet":
        from qwenvit.datasets.formats.parquet import ParquetShard

        return ParquetShard(stream, layout)
    if format == "npy":
        from qwenvit.datasets.formats.npy import NpyShard

        return NpyShard(stream, layout)
    from qwenvit.datasets.formats.safetensors import SafetensorsShard

    return SafetensorsShard(stream, layout)
