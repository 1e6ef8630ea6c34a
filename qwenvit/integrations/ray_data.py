"""Embedding images in Ray Data: the rows of a local job with Parquet shards, on any number of machines.

`pip install 'qwenvit[ray]'` on every node.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import SaveMode

from qwenvit.busy_clock import BusyClock
from qwenvit.config.published import DEFAULT_MODEL
from qwenvit.datasets.device import load_encoder
from qwenvit.datasets.embed import embed_records
from qwenvit.datasets.formats.parquet import row_of, schema_of
from qwenvit.datasets.options import JobOptions, Resolved
from qwenvit.datasets.record import Content, Record
from qwenvit.pooling import PoolMode

IMAGE_COLUMNS = ("image", "bytes", "jpg", "jpeg", "png", "webp")
"""Where images are looked for: as Hugging Face, `read_binary_files` and webdataset call the column."""
ID_COLUMNS = ("id", "path", "__key__")


@dataclass(frozen=True)
class Cell:
    """What a column has of an image."""

    value: Any

    def open(self) -> bytes | Path | NDArray[np.uint8]:
        """Return the encoded image, the path of a file or an array.

        Raises:
            ValueError: nothing of the kind.
        """
        value = self.value
        if isinstance(value, Mapping):  # Hugging Face's struct
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, str):
            return Path(value)
        if isinstance(value, bytes | np.ndarray):
            return value
        raise ValueError(
            f"expected bytes, a path, Hugging Face's struct of both or an array, got {type(value).__name__}"
        )


class EmbedImages:
    """Embeds the images of batches; for `Dataset.map_batches(EmbedImages, …, batch_format="pyarrow")`.

    A batch becomes rows of `qwenvit.datasets.formats.parquet`, and `error`: why an image could not be embedded, whose
    row has nothing else but its id and path. The bits of a row are those of a local job on the same kind of device,
    on a CPU with the same number of torch's threads: Ray gives a worker one for each core of its own.

    Args:
        model: as in `Encoder.from_pretrained`; every worker loads it once.
        device: None: the worker's GPU if it has one, else the CPU.
        column: the column of images: encoded bytes, paths that every worker can read, Hugging Face's struct, or uint8
            arrays. None: the first of `IMAGE_COLUMNS` that is there.
        id_column: the column of ids. None: the first of `ID_COLUMNS` that is there.
        root: the folder that ids which are paths are made relative to, as a local job does with a folder.
        pool: one vector for each image, as in `Embeddings.pooled`.
        normalize: divide vectors by their length.
        tokens: False leaves the tokens out.
        num_workers: threads that decode, as in `Encoder.encode`.
        decode: as in `Encoder.encode`.
        loading: arguments of `Encoder.from_pretrained`, such as `{"dtype": "float16"}`.
        options: min_pixels, max_pixels, max_tokens, size, resize; see `ImageOptions`.

    Raises:
        TypeError: an unknown option.
        ValueError: an impossible option.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        device: str | None = None,
        column: str | None = None,
        id_column: str | None = None,
        root: str | None = None,
        pool: PoolMode | None = None,
        normalize: bool = False,
        tokens: bool = True,
        num_workers: int | None = None,
        decode: Literal["pillow", "nvjpeg"] = "pillow",
        loading: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._options = JobOptions(
            model=model,
            loading=loading or {},
            format="parquet",
            pool=pool,
            normalize=normalize,
            tokens=tokens,
            shard_images=1,
            shard_bytes=1,
            num_workers=num_workers,
            decode=decode,
            video=False,
            verify=False,
            image=cast(Any, options),
        )
        self._options.check()
        self._column, self._id_column, self._root = column, id_column, root
        self._encoder = load_encoder(self._options, device)
        self._layout = Resolved.of(self._encoder, self._options).layout
        config = self._encoder.config
        width = config.hidden_size if pool == "patches" else config.out_hidden_size
        self._schema = schema_of(self._layout, width).append(pa.field("error", pa.string()))

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Yield the rows of a batch, some at a time.

        Raises:
            ValueError: no column of images or of ids.
        """
        records = list(self._records(batch))
        paths = {record.id: record.path for record in records}
        for outcome in embed_records(self._encoder, records, self._options, BusyClock()):
            if outcome.batch.copied is not None:
                outcome.batch.copied.synchronize()
            rows = [row_of(item, self._layout) for item in outcome.batch.items]
            failed = [one for one in outcome.reports if one.error is not None]
            rows += [{"id": one.id, "path": paths[one.id], "error": one.error} for one in failed]
            yield pa.Table.from_pylist(rows, self._schema)

    def _records(self, batch: pa.Table) -> Iterator[Record]:
        images = batch[_column_of(batch, "column", self._column, IMAGE_COLUMNS)]
        names = batch[_column_of(batch, "id_column", self._id_column, ID_COLUMNS)]
        for image, name in zip(images, names, strict=True):
            path = str(name.as_py())
            identifier = path if self._root is None else os.path.relpath(path, self._root)
            value = image.to_numpy() if hasattr(image, "to_numpy") else image.as_py()  # Ray's tensors are arrays
            yield Record(identifier, "", path, cast(Content, Cell(value)))


def _column_of(batch: pa.Table, argument: str, wanted: str | None, usual: tuple[str, ...]) -> str:
    for name in usual if wanted is None else (wanted,):
        if name in batch.column_names:
            return name
    expected = repr(wanted) if wanted is not None else f"one of {', '.join(usual)}"
    raise ValueError(f"{argument}: expected {expected} among the columns, got {', '.join(batch.column_names)}")


def embed_dataset(
    dataset: "ray.data.Dataset",
    output: str | None = None,
    *,
    concurrency: int | tuple[int, int] = 1,
    num_gpus: float | None = None,
    batch_size: int = 256,
    overwrite: bool = False,
    **options: Any,
) -> "ray.data.Dataset":
    """Embed the images of a Ray dataset, whose workers may die meanwhile: Ray starts others.

    Args:
        dataset: images and ids: `ray.data.read_binary_files(…, include_paths=True)`, `read_parquet` of a Hugging Face
            dataset, `read_webdataset(…, decoder=None)`. Ray's `read_images` decodes by itself, without EXIF rotation.
        output: a folder, or a URL that Ray writes to: rows are written there in Parquet, and the dataset of the files
            is returned. None: the dataset that computes the rows when it is read.
        concurrency: workers, or the least and the most of them; each has a tower. Without GPUs each takes a core, and
            reading needs more.
        num_gpus: GPUs of a worker. None: 1 if the cluster has any, else 0.
        batch_size: images that a worker takes at once; its GPU is idle at the end of each batch.
        overwrite: replace what is in `output`. False: refuse an output that exists, since rows would be there twice.
        options: arguments of `EmbedImages`.

    Returns:
        The rows that `EmbedImages` describes, in any order.

    Raises:
        ValueError: `output` exists.
    """
    if num_gpus is None:
        num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    embedded = dataset.map_batches(
        EmbedImages,
        fn_constructor_kwargs=options,
        batch_format="pyarrow",
        batch_size=batch_size,
        concurrency=concurrency,
        num_gpus=num_gpus,
    )
    if output is None:
        return embedded
    embedded.write_parquet(output, mode=SaveMode.OVERWRITE if overwrite else SaveMode.ERROR)
    return ray.data.read_parquet(output)
