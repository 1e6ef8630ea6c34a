"""Measure candidates for the launch settings of `kernels/` on this GPU, and print which settings should change.

Runs the candidates of `kernel_bench/tune_cases.py` at the shapes of published towers, through the launchers that users'
calls go through, timed as in `bench_kernels.py`. Attention in Gluon, M-RoPE and the grid plan have no candidates.
Prints a table, and the lines of source that should change; `--write` changes them. For a function that chooses by
shape, the table has its choice beside the fastest candidate: move its thresholds by hand.
"""

import argparse
import gc
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common.machine import measure_ceilings
from common.processes import run_in_processes
from common.progress import progress
from kernel_bench.cases import DTYPE, relative_error
from kernel_bench.launch_configs import Tunable, Workload, apply_changes, format_config, override, replace_constant
from kernel_bench.timing import header, input_set_count, median_seconds
from kernel_bench.tune_cases import tunables

MIN_GAIN = 1.02
"""Speedup from which a change is proposed. Medians of one run repeat within 1 %."""
MAX_DIFFERENCE = 1e-2
"""Relative L2 by which a candidate's result may differ from the current one: other tiles sum in another order."""
CURRENT = -1
"""Index of the current setting among the candidates."""
KERNELS_FOLDER = Path(__file__).resolve().parent.parent / "kernels"


def run(workload: Workload, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run the workload on copies of its inputs and return all results in one fp64 vector."""
    out = workload.call({name: x.clone() if x.is_contiguous() else x for name, x in inputs.items()})
    parts = out if isinstance(out, tuple) else (out,)
    return torch.cat([part.double().flatten() for part in parts])


def try_candidate(only: list[str], number: int) -> list[str]:
    """Run one candidate on every workload of its setting. Return why it failed on each, or an empty string."""
    tunable, candidate = all_candidates(selected_tunables(only))[number]
    failures = []
    for workload in tunable.workloads:
        torch.manual_seed(0)
        try:
            inputs = workload.make_inputs(torch.device("cuda"), DTYPE)
            expected = run(workload, inputs)
            with override(tunable, candidate):
                difference = relative_error(run(workload, inputs), expected)
            failures.append("" if difference <= MAX_DIFFERENCE else f"wrong: relative L2 {difference:.1e}")
        except Exception as error:  # noqa: BLE001 (a candidate that does not compile or launch is a result)
            failures.append(
                f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error)
            )
    return failures


def source_path(tunable: Tunable) -> Path:
    """Return the file that sets the launch setting."""
    return KERNELS_FOLDER.joinpath(*tunable.module.split(".")).with_suffix(".py")


def selected_tunables(only: list[str]) -> list[Tunable]:
    """Return the settings whose title or module is in `only`; all if it is empty."""
    tma = torch.cuda.get_device_capability() >= (9, 0)
    return [tunable for tunable in tunables(tma) if not only or tunable.title in only or tunable.module in only]


def all_candidates(selected: list[Tunable]) -> list[tuple[Tunable, Any]]:
    return [(tunable, candidate) for tunable in selected for candidate in tunable.candidates]


def measure(tunable: Tunable, workload: Workload, candidates: list[Any]) -> tuple[list[Any], dict[int, float]]:
    """Return the current values that the workload used, and seconds a call by the candidate's index, or CURRENT.

    Candidates that are None are not measured.
    """
    device = torch.device("cuda")
    first = workload.make_inputs(device, DTYPE)
    input_sets = [first] + [workload.make_inputs(device, DTYPE) for _ in range(input_set_count(first) - 1)]

    def call(index: int, inputs: dict[str, torch.Tensor]) -> object:
        with override(tunable, None if index == CURRENT else candidates[index]):
            return workload.call(inputs)

    with override(tunable, None) as used:
        workload.call(first)
    indices = [CURRENT, *(index for index, candidate in enumerate(candidates) if candidate is not None)]
    seconds = median_seconds({str(index): lambda x, index=index: call(index, x) for index in indices}, input_sets)
    return used, {int(index): value for index, value in seconds.items()}


def tune(tunable: Tunable, failures: list[list[str]]) -> Any:
    """Measure and print one row a workload. Return a constant's better value, or None.

    `failures` has one list a candidate: its failure on each workload, or an empty string.
    """
    gains: dict[int, list[float]] = {index: [] for index in range(len(tunable.candidates))}
    for i_workload, workload in enumerate(tunable.workloads):
        progress(f"{tunable.title}: {workload.title}")
        usable = [None if failures[index][i_workload] else c for index, c in enumerate(tunable.candidates)]
        used, seconds = measure(tunable, workload, usable)
        gc.collect()
        torch.cuda.empty_cache()
        progress("")
        if not used:
            print(f"| {tunable.title} | {workload.title} | not used |" + " |" * 4, flush=True)
            continue
        now = used[-1]
        candidate_seconds = {index: value for index, value in seconds.items() if index != CURRENT}
        for index, value in candidate_seconds.items():
            gains[index].append(seconds[CURRENT] / value)
        fastest = min(candidate_seconds, key=lambda index: candidate_seconds[index], default=CURRENT)
        gain = seconds[CURRENT] / seconds[fastest]
        cells = ["same"] * 3
        if gain >= MIN_GAIN:
            config = apply_changes(now, tunable.candidates[fastest])
            cells = [format_config(config), f"{seconds[fastest] * 1e6:.1f}", f"{gain:.2f}×"]
        cells = [tunable.title, workload.title, format_config(now), f"{seconds[CURRENT] * 1e6:.1f}", *cells]
        print(f"| {' | '.join(cells)} |", flush=True)
    if tunable.is_function:
        return None
    mean_gains = {
        index: math.prod(values) ** (1 / len(values))
        for index, values in gains.items()
        if len(values) == len(tunable.workloads)
    }
    best = max(mean_gains, key=lambda index: mean_gains[index], default=None)
    if best is None or mean_gains[best] < MIN_GAIN:
        return None
    return apply_changes(tunable.current, tunable.candidates[best])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = tunables()
    titles = [tunable.title for tunable in every]
    parser.add_argument("--only", nargs="+", default=[], metavar="KERNEL",
                        help=f"modules of kernels/, or single settings: {', '.join(titles)}")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="change the constants in kernels/")
    parser.add_argument("--commit", help="commit to print where the checkout has no .git")
    options = parser.parse_args()
    known = {name for tunable in every for name in (tunable.title, tunable.module)}
    if unknown := sorted(set(options.only) - known):
        parser.error(f"--only: expected modules or settings among {', '.join(titles)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        raise SystemExit("tune.py: needs a GPU, and torch sees none")
    start = time.monotonic()
    selected = selected_tunables(options.only)
    results = iter(run_in_processes(try_candidate, options.only, len(all_candidates(selected))))
    print(header(measure_ceilings(), options.commit))
    print("\n| setting | workload | current | µs | fastest | µs | gain |\n|---|---|---|---|---|---|---|")
    changes, failed = [], []
    for tunable in selected:
        failures = [next(results) for _ in tunable.candidates]
        if (better := tune(tunable, failures)) is not None:
            changes.append((tunable, better))
        for candidate, reasons in zip(tunable.candidates, failures, strict=True):
            for workload, reason in zip(tunable.workloads, reasons, strict=True):
                if reason:
                    failed.append(f"{tunable.title}, {candidate}, {workload.title}: {reason}")
    print("\nCandidates that failed or gave wrong results:" if failed else "\nEvery candidate ran.")
    for line in failed:
        print(line)
    print("\nConstants to change:" if changes else "\nNo constant to change.")
    for tunable, better in changes:
        path = source_path(tunable)
        new, now = format_config(better), format_config(tunable.current)
        print(f"{path.relative_to(KERNELS_FOLDER.parent)}: {tunable.name} = {new}  # now {now}")
        if options.write:
            path.write_text(replace_constant(path.read_text(), tunable.name, better))
    print(f"\n{time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
