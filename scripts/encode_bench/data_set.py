"""The data-set job of `bench_encode.py`: `encode_dataset` of many files, against the encoder's pipeline alone."""

import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.steps import ParityError
from common.timing import synchronize, wall_seconds
from encode_bench.parity import same
from encode_bench.verdicts import PIPELINE, TOKENS, VECTORS, Row
from qwenvit import Encoder, encode_dataset, load_embeddings
from qwenvit.datasets.progress import Progress

IMAGES, WARM_IMAGES, COMPARED_IMAGES = 2000, 256, 8
ROUNDS, MAX_SECONDS = 3, 60.0
"""Timed rounds; fewer, where they take longer than MAX_SECONDS together."""
OUTPUTS: dict[str, dict[str, Any]] = {VECTORS: {"pool": "mean", "tokens": False, "format": "npy"}, TOKENS: {}}
"""What the job writes: one vector for each image, or the bf16 tokens in safetensors."""
BLOCK = 2**24


def data_set(encoder: Encoder, paths: Sequence[Path], images: int = IMAGES) -> Row:
    """Time jobs over hard links to the files, one after another, with an encoder that is loaded and warm.

    A job's seconds are those that it reports: from the first file to the last shard on the disk. Its output is removed
    before the next.

    Args:
        encoder: the encoder.
        paths: the files.
        images: links to make.

    Returns:
        Median seconds of `PIPELINE` (`iter_encode`, results dropped), `VECTORS` and `TOKENS`; of `disk`: to write as
        many bytes as the tokens have into files of a shard's size; `images`; `bytes`, of the tokens.

    Raises:
        ParityError: tokens in a shard differ from those of `encode`.
    """
    with tempfile.TemporaryDirectory(dir=paths[0].parent.parent) as parent:
        folder, few, output = (Path(parent, name) for name in ("files", "few", "output"))
        links = _link(paths, folder, images)
        _check_rows(encoder, _link(paths, few, min(WARM_IMAGES, images))[:COMPARED_IMAGES], output)
        for options in OUTPUTS.values():  # pinned memory and CUDA graphs
            _job_seconds(encoder, few, output, options)
        seconds: dict[str, list[float]] = {name: [] for name in (PIPELINE, *OUTPUTS, "disk")}
        start, size = time.perf_counter(), 0
        for _ in range(ROUNDS):
            seconds[PIPELINE].append(wall_seconds(lambda: _exhaust(encoder, links)))
            for name, options in OUTPUTS.items():
                taken, size = _job_seconds(encoder, folder, output, options)  # in the end that of the tokens
                seconds[name].append(taken)
            seconds["disk"].append(_disk_seconds(output, size))
            if time.perf_counter() - start > MAX_SECONDS:
                break
        row: Row = {name: statistics.median(times) for name, times in seconds.items()}
        return row | {"images": images, "bytes": size}


def _link(paths: Sequence[Path], folder: Path, count: int) -> list[Path]:
    """Make a folder of so many links to the files, and return them in order."""
    folder.mkdir()
    links = [folder / f"{index:06}{paths[0].suffix}" for index in range(count)]
    for link, path in zip(links, itertools.cycle(paths), strict=False):
        os.link(path, link)
    return links


def _exhaust(encoder: Encoder, paths: Sequence[Path]) -> None:
    for _ in encoder.iter_encode(paths):
        pass


def _check_rows(encoder: Encoder, paths: Sequence[Path], output: Path) -> None:
    encode_dataset(paths, output, model=encoder)
    (shard,) = output.glob("*.safetensors")
    found, expected = load_embeddings(shard).values(), encoder.encode(paths)
    rows, tokens = ([item.tokens.cpu() for item in embeddings] for embeddings in (found, expected))
    if not same(rows, tokens):
        raise ParityError("the tokens in a shard differ from those of encode")
    shutil.rmtree(output)


def _job_seconds(encoder: Encoder, folder: Path, output: Path, options: dict[str, Any]) -> tuple[float, int]:
    """Return the seconds of a job, and the bytes of its shards."""
    reports: list[Progress] = []
    synchronize()
    manifest = encode_dataset(folder, output, model=encoder, progress=reports.append, **options)
    shutil.rmtree(output)
    if reports[-1].failed or not manifest.complete:
        raise ValueError(f"{folder}: expected a job without failures, got {manifest.counts}")
    return reports[-1].seconds, manifest.counts["bytes"]


def _disk_seconds(folder: Path, size: int, shard_bytes: int = 2**30) -> float:
    """Return the seconds to write `size` bytes, each file brought to the disk while the next is written."""
    block = torch.randint(256, (BLOCK,), dtype=torch.uint8).numpy().data
    folder.mkdir()
    start, left = time.perf_counter(), size
    synced: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        while left > 0:
            size_of_file = min(left, shard_bytes)
            file = (folder / f"{left}").open("wb")
            for first in range(0, size_of_file, BLOCK):
                file.write(block[: min(BLOCK, size_of_file - first)])
            synced.append(pool.submit(_sync, file))
            left -= size_of_file
        for each in synced:
            each.result()
    taken = time.perf_counter() - start
    shutil.rmtree(folder)
    return taken


def _sync(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())
