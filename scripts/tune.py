"""Measure launch configs on this GPU, and print which would change.

Every candidate of the launch configs in `tune_cases.py` (not of attention in Gluon, M-RoPE and the grid plan) runs on
the shapes of published towers, through the launchers that users' calls go through, timed like `bench_kernels.py`.
Prints a table, and the lines of source that would change; `--write` changes them. Where a function chooses (by shape),
its choice stands beside the best one measured, for a person to move a threshold.
"""

import argparse
import gc
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common.jobs import parallel, progress
from common.machine import ceilings
from kernel_bench.cases import DTYPE, relative_error
from kernel_bench.launch_configs import Knob, Shape, configured, full, rewritten, spelled
from kernel_bench.timing import header, medians, set_count
from kernel_bench.tune_cases import knobs

WORTH = 1.02
"""Gain from which a change is proposed: medians of one run repeat within 1 %."""
SAME = 1e-2
"""Relative L2 by which a candidate's result may differ from the current one's: other tiles sum in other orders."""
FOLDER = Path(__file__).resolve().parent.parent / "kernels"


def result_of(shape: Shape, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A call's result, its inputs left as they are."""
    out = shape.call({name: x.clone() if x.is_contiguous() else x for name, x in inputs.items()})
    parts = out if isinstance(out, tuple) else (out,)
    return torch.cat([part.double().flatten() for part in parts])


def try_candidate(only: list[str], number: int) -> list[str]:
    """Run one candidate on every shape of its knob; why it failed on each, or nothing."""
    knob, candidate = all_candidates(chosen(only))[number]
    failures = []
    for shape in knob.shapes:
        torch.manual_seed(0)
        try:
            inputs = shape.inputs(torch.device("cuda"), DTYPE)
            now = result_of(shape, inputs)
            with configured(knob, candidate):
                difference = relative_error(result_of(shape, inputs), now)
            failures.append("" if difference <= SAME else f"wrong: relative L2 {difference:.1e}")
        except Exception as error:  # noqa: BLE001 (a candidate that does not compile or launch is a result)
            failures.append(
                f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error)
            )
    return failures


def source_of(knob: Knob) -> Path:
    """The file that sets the knob's launch config."""
    return FOLDER.joinpath(*knob.module.split(".")).with_suffix(".py")


def chosen(only: list[str]) -> list[Knob]:
    tma = torch.cuda.get_device_capability() >= (9, 0)
    return [knob for knob in knobs(tma) if not only or knob.title in only or knob.module in only]


def all_candidates(selected: list[Knob]) -> list[tuple[Knob, Any]]:
    return [(knob, candidate) for knob in selected for candidate in knob.candidates]


def measure(knob: Knob, shape: Shape, candidates: list[Any]) -> tuple[list[Any], dict[int, float]]:
    """The configs in use, and seconds by the candidate's place; -1 is what is in use."""
    device = torch.device("cuda")
    first = shape.inputs(device, DTYPE)
    sets = [first] + [shape.inputs(device, DTYPE) for _ in range(set_count(first) - 1)]

    def call(place: int, inputs: dict[str, torch.Tensor]) -> object:
        with configured(knob, None if place < 0 else candidates[place]):
            return shape.call(inputs)

    with configured(knob, None) as seen:
        shape.call(first)
    runs = [-1, *(place for place, candidate in enumerate(candidates) if candidate is not None)]
    seconds = medians({str(place): lambda x, place=place: call(place, x) for place in runs}, sets)
    return seen, {int(place): value for place, value in seconds.items()}


def tune(knob: Knob, failures: list[list[str]]) -> Any:
    """Print the knob's rows; the constant's better value, or None."""
    gains: dict[int, list[float]] = {place: [] for place in range(len(knob.candidates))}
    for number, shape in enumerate(knob.shapes):
        progress(f"{knob.title}: {shape.title}")
        usable = [None if failures[place][number] else c for place, c in enumerate(knob.candidates)]
        seen, seconds = measure(knob, shape, usable)
        gc.collect()
        torch.cuda.empty_cache()
        progress("")
        if not seen:
            print(f"| {knob.title} | {shape.title} | not used |" + " |" * 4, flush=True)
            continue
        now = seen[-1]
        current = seconds[-1]
        others = {place: value for place, value in seconds.items() if place >= 0}
        for place, value in others.items():
            gains[place].append(current / value)
        best = min(others, key=lambda place: others[place], default=None)
        best_config, best_seconds = (
            (now, current) if best is None else (full(now, knob.candidates[best]), seconds[best])
        )
        gain = current / best_seconds
        cells = [spelled(best_config), f"{best_seconds * 1e6:.1f}", f"{gain:.2f}×"] if gain >= WORTH else ["same"] * 3
        progress("")
        print(
            f"| {knob.title} | {shape.title} | {spelled(now)} | {current * 1e6:.1f} | {' | '.join(cells)} |", flush=True
        )
    if knob.is_function:
        return None
    means = {place: math.prod(own) ** (1 / len(own)) for place, own in gains.items() if len(own) == len(knob.shapes)}
    best = max(means, key=lambda place: means[place], default=None)
    return full(knob.current, knob.candidates[best]) if best is not None and means[best] >= WORTH else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    titles = [knob.title for knob in knobs()]
    parser.add_argument("--only", nargs="+", default=[], metavar="KERNEL",
                        help=f"modules of kernels/, or single configs: {', '.join(titles)}")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="change the constants in kernels/*.py")
    parser.add_argument("--commit", help="what to print as the commit where the checkout has no .git")
    options = parser.parse_args()
    known = {name for title in titles for name in (title, title.split(".")[0])}
    if unknown := sorted(set(options.only) - known):
        parser.error(f"--only: expected modules or configs among {', '.join(titles)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        raise SystemExit("tune.py: needs a GPU, and torch sees none")
    start = time.monotonic()
    selected = chosen(options.only)
    found = iter(parallel(try_candidate, options.only, len(all_candidates(selected))))
    print(header(ceilings(), options.commit))
    print("\n| config | shape | now | µs | best | µs | gain |\n|---|---|---|---|---|---|---|")
    changes, failed = [], []
    for knob in selected:
        failures = [next(found) for _ in knob.candidates]
        if (better := tune(knob, failures)) is not None:
            changes.append((knob, better))
        for candidate, reasons in zip(knob.candidates, failures, strict=True):
            shapes = zip(knob.shapes, reasons, strict=True)
            failed += [f"{knob.title}, {candidate}, {shape.title}: {reason}" for shape, reason in shapes if reason]
    print("\n".join(["\nCandidates that did not run, or not right:", *failed]) if failed else "\nEvery candidate ran.")
    print("\nConstants to change:" if changes else "\nNo constant to change.")
    for knob, better in changes:
        path = source_of(knob)
        print(f"{path.parent.name}/{path.name}: {knob.name} = {spelled(better)}  # now {spelled(knob.current)}")
        if options.write:
            path.write_text(rewritten(path.read_text(), knob.name, better))
    print(f"\n{time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
