"""Jobs in processes of their own, which a test may kill, and what such a job leaves in its folder."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import warnings
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from qwenvit.datasets.job import encode_dataset
from qwenvit.datasets.signals import Interrupted

SETTINGS: dict[str, Any] = {"model": "demo", "devices": "cpu", "min_pixels": 1024, "pool": "mean", "num_workers": 2}
"""Of most jobs in tests: small images stay small."""

_FORK_SERVER = multiprocessing.get_context("forkserver")
# Imported once for all jobs; building a tower imports torch._dynamo, which takes seconds. Python 3.11's server does not
# find modules of the tests.
_FORK_SERVER.set_forkserver_preload(["qwenvit.datasets.job", "qwenvit.datasets.formats.safetensors", "torch._dynamo"])


def make_pictures(folder: Path, count: int) -> Path:
    """Write pictures of noise of a few sizes, no two of them equal."""
    folder.mkdir(parents=True)
    for number in range(count):
        size = (32 * (1 + number % 3), 32 * (1 + number % 2), 3)
        pixels = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return folder


def run_job(inputs: Path, output: Path, **settings: Any) -> Any:
    """Run a job in this process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model='demo'")
        return encode_dataset(inputs, output, **(SETTINGS | settings))


def start_job(
    inputs: Path, output: Path, *, dies_at: int | None = None, signals_at: tuple[int, ...] = (), **settings: Any
) -> ForkServerProcess:
    """Start a job in a process of its own.

    Args:
        inputs: the job's.
        output: the job's.
        dies_at: kill the process just before it opens, renames or removes a file in `output` for the n-th time.
        signals_at: an item, counted from 1, and signals that the process sends itself once this item is encoded.
        settings: of the job, instead of those in `SETTINGS`.
    """
    process = _FORK_SERVER.Process(target=_job, args=(inputs, output, dies_at, signals_at, settings))
    process.start()
    return process


def exit_code(process: ForkServerProcess) -> int:
    """Wait for the end of a job; negative if a signal killed it."""
    process.join(300)
    assert process.exitcode is not None, "the job hangs"
    return process.exitcode


def _job(
    inputs: Path, output: Path, dies_at: int | None, signals_at: tuple[int, ...], settings: dict[str, Any]
) -> None:
    torch.set_num_threads(2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if dies_at is not None:
        left = dies_at

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove") and str(output) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
    if signals_at:
        items = itertools.count(1)

        def send_signals(_: object) -> None:
            if next(items) == signals_at[0]:
                for signum in signals_at[1:]:
                    os.kill(os.getpid(), signum)

        settings = settings | {"on_item": send_signals}
    try:
        run_job(inputs, output, **settings)
    except Interrupted as stopped:
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        sys.exit(130)


def rows_of(output: Path) -> dict[str, dict[str, bytes]]:
    """Return the bytes of every tensor of every row by the row's id, and its grid; an id that occurs twice fails."""
    rows: dict[str, dict[str, bytes]] = {}
    for shard in sorted(output.glob("*.safetensors")):
        index = [json.loads(line) for line in shard.with_suffix(".index.jsonl").read_text().splitlines()]
        found = load_file(shard)
        found.pop("padding", None)
        pooled = found.pop("pooled", torch.empty(len(index), 0))
        assert len(pooled) == len(index)
        tensors = {row["id"]: {"pooled": vector} for row, vector in zip(index, pooled, strict=True)}
        assert len(tensors) == len(index)
        for name, tensor in found.items():
            identifier, _, key = name.rpartition("/")
            tensors[identifier][key] = tensor
        assert not rows.keys() & tensors.keys(), "an image has two rows"
        for row in index:
            contents = {key: bytes_of(tensor) for key, tensor in tensors[row["id"]].items()}
            rows[row["id"]] = contents | {"grid": str(row["grid"]).encode()}
    return rows


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def leftovers(output: Path) -> list[str]:
    """Return the files of an ended job's folder that should not be there."""
    stems = {path.name.partition(".")[0] for path in output.glob("*.safetensors")}
    expected = {"manifest.json", "errors.jsonl", ".lock"}
    expected |= {f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".index.jsonl")}
    return sorted({path.name for path in output.iterdir()} - expected)
