"""Time a cold start: from load to first embedding, in a new process with empty compilation caches.

The time runs from the call of `Encoder.from_pretrained` until the embedding of one image is in the host's memory. It
includes the start of CUDA, reading the file, packing, compilation, preprocessing and the image's copy to the GPU, and
excludes imports. The file is read once before, so it comes from the system's cache; the seconds of that read are
reported and not subtracted. Prints a line of JSON; progress goes to stderr.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.progress import progress

TIMEOUT = 300
"""Seconds after which the process is killed."""
IMAGE_SIDE = 448
CACHE_FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "driver"}


def cold_start(source: Path, device: str = "cuda", impl: str = "triton") -> dict[str, Any]:
    """Return what `first_embedding` measures in a new process whose caches are empty, and the kernels it compiled.

    Raises:
        RuntimeError: the process failed, or it compiled nothing into its empty cache.
        subprocess.TimeoutExpired: it took longer than TIMEOUT.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: str(Path(folder, cache)) for name, cache in CACHE_FOLDERS.items()}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-m", "e2e.cold", str(source), device, impl]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT)
        if done.returncode:
            raise RuntimeError(f"the cold process ended with {done.returncode}")
        figures = json.loads(done.stdout)
        figures["kernels"] = len(list(Path(folder, "triton").glob("*/*.cubin")))
    if impl == "triton" and not figures["kernels"]:
        raise RuntimeError("the cold process compiled no kernel: its cache was not the empty one")
    return figures


def first_embedding(source: Path, device: str, impl: str) -> dict[str, float]:
    """Return the seconds of imports, reading the file, loading the encoder, and the first and second image."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        progress(f"cold process: {step}")
        start = time.perf_counter()
        yield
        seconds[step] = time.perf_counter() - start

    with timed("imports"):
        import numpy as np

        from qwenvit import Encoder
    with timed("read"):
        size = len((source / "model.safetensors").read_bytes())
    image = np.random.default_rng(0).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    with timed("load"):
        encoder = Encoder.from_pretrained(source, device=device, dtype="bfloat16", impl=impl)
    for step in ("first", "second"):
        with timed(step):
            encoder.encode(image).packed.cpu()
    progress("")
    return seconds | {"bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with a tower's model.safetensors and config.json")
    parser.add_argument("device")
    parser.add_argument("impl", choices=["triton", "reference"])
    options = parser.parse_args()
    print(json.dumps(first_embedding(options.source, options.device, options.impl)))


if __name__ == "__main__":
    main()
