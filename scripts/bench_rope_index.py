"""Time `qwenvit.rope_index` against transformers' `get_rope_index` and a numpy version with a single copy to the host.

Contenders run interleaved in one process, some calls each, and medians are printed. Results are compared first; no time
is printed where they differ. On a GPU there are two figures: the wall time of a call until its result is ready, and the
host time of a call while the GPU is busy with earlier work, as in training and serving, where a synchronisation waits
for all of that work.
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
from peers.rope_index import SETUPS, numpy_rope_index, processor_inputs, transformers_rope_index

CALLS = 12
"""Calls of a contender in a round."""
WARMUP = 2
"""The first calls of a contender in each round, and the first rounds, do not count."""
MATRIX_SIDE = 4096
"""Side of the square matrices whose products keep the GPU busy."""

Call = Callable[[], tuple[torch.Tensor, ...]]


def contenders(family: str, inputs: dict[str, torch.Tensor]) -> dict[str, Call]:
    without_ids = {key: value for key, value in inputs.items() if key != "input_ids"}
    return {
        "qwenvit": lambda: qwenvit.rope_index(family=family, **without_ids),
        "transformers": lambda: transformers_rope_index(family, **inputs),
        "numpy": lambda: numpy_rope_index(family, inputs),
    }


def check(name: str, calls: dict[str, Call]) -> None:
    """Exit with a message unless all contenders return equal positions and deltas."""
    ours = calls["qwenvit"]()
    for rival in ("transformers", "numpy"):
        for output, our, their in zip(("positions", "deltas"), ours, calls[rival](), strict=True):
            if not torch.equal(our, their):
                raise SystemExit(f"{name}: qwenvit and {rival} differ in {output}; no times for different results")


def call_microseconds(call: Call, device: torch.device, keep_busy: Callable[[], object] | None) -> float:
    """Return the wall time of a call until its result is ready, or with `keep_busy`, until the host is free again."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if keep_busy is not None:
            keep_busy()
    start = time.perf_counter()
    call()
    if device.type == "cuda" and keep_busy is None:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e6


def medians(
    calls: dict[str, Call], device: torch.device, rounds: int, keep_busy: Callable[[], object] | None
) -> dict[str, float]:
    """Return the median microseconds of each contender."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + WARMUP):
        for name, call in calls.items():
            spent = [call_microseconds(call, device, keep_busy) for _ in range(CALLS)]
            # The first calls of a round run with caches full of a rival's code and data.
            times[name] += spent[WARMUP:] if round_number >= WARMUP else []
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--families", nargs="+", default=["qwen2_5_vl", "qwen3_vl"], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of 10 timed calls of each contender")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    device = torch.device(options.device)
    keep_busy = None
    if device.type == "cuda":
        matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=torch.bfloat16)

        def keep_busy() -> None:
            for _ in range(10):
                matrix @ matrix

    for name, family in itertools.product(SETUPS, options.families):
        inputs = {key: value.to(device) for key, value in processor_inputs(name, family).items()}
        check(f"{name}, {family}", contenders(family, inputs))
    device_name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {numpy.__version__}"
    versions += f", Python {platform.python_version()}"
    print(f"{device_name}; {versions}; median of {options.rounds} × {CALLS - WARMUP} calls in µs\n")
    columns = ["qwenvit", "transformers", "numpy"]
    print("| set-up | family | " + " | ".join([*columns, "over transformers", "over numpy"]) + " |")
    print("|---|---|" + "---|" * 5)
    figures = []
    for kind, load in (("wall", None), *((("queue busy", keep_busy),) if keep_busy else ())):
        for name, (rows, length, images, videos, frames) in SETUPS.items():
            for family in options.families:
                inputs = {key: value.to(device) for key, value in processor_inputs(name, family).items()}
                found = medians(contenders(family, inputs), device, options.rounds, load)
                title = f"{name}: B={rows}, S={length}, {images} images, {videos} videos of {frames}"
                ratios = [found[rival] / found["qwenvit"] for rival in ("transformers", "numpy")]
                cells = [f"{found[column]:.0f}" for column in columns] + [f"{ratio:.1f}×" for ratio in ratios]
                print(f"| {title}{', ' + kind if keep_busy else ''} | {family} | " + " | ".join(cells) + " |")
                figures.append({"setup": name, "family": family, "kind": kind, "microseconds": found})
    if options.json:
        options.json.write_text(json.dumps({"device": device_name, "versions": versions, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
