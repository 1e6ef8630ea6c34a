"""Load to first embedding in a process of its own, where no compiled kernel is to be found.

The clock runs from the call of `Encoder.from_pretrained` until the embedding of one image is in the host's memory:
start of CUDA, reading the file, packing, compilation, preprocessing and the image's way to the GPU are all in it,
imports are not. The file's bytes were read once before, so they lie in the system's cache; the seconds of that reading
stand beside and are not subtracted. Prints a line of JSON; progress goes to stderr.
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

from common.jobs import progress

LIMIT = 300
"""Seconds after which the process is given up."""
SIDE = 448
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "driver"}


def cold_start(source: Path, device: str = "cuda", impl: str = "triton") -> dict[str, Any]:
    """What `first_embedding` says in a new process whose caches are empty.

    Raises:
        RuntimeError: the process failed, or its caches were not those it was given.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder, cache)) for name, cache in CACHES.items()}
        command = [sys.executable, "-m", "e2e.cold", str(source), device, impl]
        caches["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
        if done.returncode:
            raise RuntimeError(f"the cold process ended with {done.returncode}")
        found = json.loads(done.stdout)
        found["kernels"] = len(list(Path(folder, "triton").glob("*/*.cubin")))
    if impl == "triton" and not found["kernels"]:
        raise RuntimeError("the cold process compiled no kernel: its cache was not the empty one")
    return found


def first_embedding(source: Path, device: str, impl: str) -> dict[str, float]:
    """Seconds of the imports, of reading the file's bytes, of loading the encoder, of the first and second image."""
    spent: dict[str, float] = {}

    @contextmanager
    def clock(part: str) -> Iterator[None]:
        progress(f"cold process: {part}")
        start = time.perf_counter()
        yield
        spent[part] = time.perf_counter() - start

    with clock("imports"):
        import numpy as np

        from qwenvit import Encoder
    with clock("read"):
        size = len((source / "model.safetensors").read_bytes())
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    with clock("load"):
        encoder = Encoder.from_pretrained(source, device=device, dtype="bfloat16", impl=impl)
    for part in ("first", "second"):
        with clock(part):
            encoder.encode(image).packed.cpu()
    progress("")
    return spent | {"bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with a tower's model.safetensors and config.json")
    parser.add_argument("device")
    parser.add_argument("impl", choices=["triton", "reference"])
    options = parser.parse_args()
    print(json.dumps(first_embedding(options.source, options.device, options.impl)))


if __name__ == "__main__":
    main()
