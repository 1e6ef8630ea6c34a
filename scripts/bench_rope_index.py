"""Time `qwenvit.rope_index` against transformers' `get_rope_index` and a numpy version with one host pull.

All in one process, in turns of some calls each, medians; results are compared first, and nothing is printed where they
differ. On a GPU there are two figures: the wall time of the call until its result is there, and the time the host is
held up when it calls with work still queued on the GPU, as in training and serving, where a synchronisation waits for
all of that.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
import transformers

import qwenvit
from peers.mrope import SETUPS, numpy_rope_index, setup, transformers_rope_index

CALLS = 12
"""Calls of a contender in a turn; the first two of them, and the first two turns, are not counted."""
QUEUE = 4096
"""Side of the square matrix products that keep the GPU's queue busy."""


def contenders(family: str, inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    keyed = {key: value for key, value in inputs.items() if key != "input_ids"}
    return {
        "qwenvit": lambda: qwenvit.rope_index(family=family, **keyed),
        "transformers": lambda: transformers_rope_index(family, **inputs),
        "numpy": lambda: numpy_rope_index(family, inputs),
    }


def check(name: str, functions: dict[str, Callable[[], tuple[torch.Tensor, ...]]]) -> None:
    ours = functions["qwenvit"]()
    for rival in ("transformers", "numpy"):
        for part, mine, other in zip(("positions", "deltas"), ours, functions[rival](), strict=True):
            if not torch.equal(mine, other):
                raise SystemExit(f"{name}: qwenvit and {rival} differ in {part}; no times for different results")


def host_microseconds(function: Callable[[], object], device: torch.device, busy: Callable[[], object] | None) -> float:
    """Host time of one call: to the end of its work, or with the queue busy, until the host is free again."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if busy is not None:
            busy()
    start = time.perf_counter()
    function()
    if device.type == "cuda" and busy is None:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e6


def medians(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int, busy: Callable[[], object] | None
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            calls = [host_microseconds(function, device, busy) for _ in range(CALLS)]
            times[name] += calls[2:] if turn >= 2 else []  # the first calls find the caches full of a rival's code
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--families", nargs="+", default=["qwen2_5_vl", "qwen3_vl"], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each, of 10 calls that count")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    device = torch.device(options.device)
    busy = None
    if device.type == "cuda":
        left = torch.randn(QUEUE, QUEUE, device=device, dtype=torch.bfloat16)

        def busy() -> None:
            for _ in range(10):
                left @ left

    for name, family in itertools.product(SETUPS, options.families):
        inputs = {key: value.to(device) for key, value in setup(name, family).items()}
        check(f"{name}, {family}", contenders(family, inputs))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {numpy.__version__}"
    versions += f", Python {platform.python_version()}"
    print(f"{where}; {versions}; median of {options.rounds} × {CALLS - 2} calls in µs\n")
    columns = ["qwenvit", "transformers", "numpy"]
    print("| set-up | family | " + " | ".join([*columns, "over transformers", "over numpy"]) + " |")
    print("|---|---|" + "---|" * 5)
    figures = []
    for label, load in (("wall", None), *((("queue busy", busy),) if busy else ())):
        for name, (rows, length, images, videos, frames) in SETUPS.items():
            for family in options.families:
                inputs = {key: value.to(device) for key, value in setup(name, family).items()}
                found = medians(contenders(family, inputs), device, options.rounds, load)
                what = f"{name}: B={rows}, S={length}, {images} images, {videos} videos of {frames}"
                ratios = [found[rival] / found["qwenvit"] for rival in ("transformers", "numpy")]
                cells = [f"{found[column]:.0f}" for column in columns] + [f"{ratio:.1f}×" for ratio in ratios]
                print(f"| {what}{', ' + label if busy else ''} | {family} | " + " | ".join(cells) + " |")
                figures.append({"setup": name, "family": family, "kind": label, "microseconds": found})
    if options.json:
        options.json.write_text(json.dumps({"device": where, "versions": versions, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
