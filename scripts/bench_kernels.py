"""Time every kernel against the best that others offer for the same work, on one GPU, in one run.

Rivals: attention by cuDNN (through SDPA), FlashAttention 2 (torch's) and, if `--fa3` and `--fa4` give them,
FlashAttention 3 and 4, each after RoPE in torch or in a fused Triton pass; cuBLAS followed by the rest of the
operation; the plain torch sequence, and torch.compile of it. Results are compared with fp64 first: a case whose
relative error is more than 1.05 times that of plain torch in bf16 is not timed. Prints markdown tables; progress goes
to stderr.

    python scripts/bench_kernels.py --fa3 fa3.so --fa4 FOLDER --json kernels.json
    python scripts/bench_kernels.py --read kernels.json --page BENCHMARKS.md --chart scripts/readme/kernels.png

qwenvit's kernels rotate channel pairs (2i, 2i + 1), as in towers whose QKV weights are permuted at load. Rivals with
RoPE in torch rotate pairs (i, i + D/2), as in transformers; rivals with a Triton pass get the faster layout for it. In
the rows "pairs as halves" all use the unpermuted layout.
"""

import argparse
import contextlib
import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo

from common.machine import Ceilings, measure_ceilings
from common.pages import rewrite
from common.processes import run_in_processes
from common.progress import progress
from common.results import add_report_arguments, require_gpu, save
from kernel_bench.attention_cases import attention_cases
from kernel_bench.cases import DTYPE, Case, Measurement, relative_error
from kernel_bench.compile_time import MODELS, measure_compile_times
from kernel_bench.page import KERNELS_MARKERS, Results, block, merge
from kernel_bench.pass_cases import pass_cases
from kernel_bench.patch_cases import patch_cases
from kernel_bench.projection_cases import projection_cases
from kernel_bench.report import (
    SECTIONS,
    Row,
    bar_text,
    compile_table,
    draw_chart,
    mean_over_fa4,
    table_header,
    table_row,
)
from kernel_bench.timing import header, input_set_count, launched_kernels, median_seconds, peak_extra_bytes
from peers.attention import HOW_RIVALS_RUN, Attention, load_libraries
from peers.torch_compile import set_up_compile

MAX_ERROR_RATIO = 1.05
"""Largest error of qwenvit's kernels, relative to plain torch's."""
MAX_RIVAL_ERROR_RATIO = 3.0
"""The same for rivals: they must do the same work, but need not reach our accuracy."""


def all_cases(only: list[str], libraries: dict[str, Attention]) -> list[Case]:
    """Return the cases of these sections, in the order of SECTIONS, with these attention libraries as rivals."""
    cases = attention_cases(libraries) + projection_cases() + pass_cases() + patch_cases()
    return sorted((case for case in cases if case.section in only), key=lambda case: list(SECTIONS).index(case.section))


def compile_case(only: list[str], number: int) -> None:
    """Run the implementations of one case that compile, to fill the caches on disk."""
    set_up_compile()
    case = all_cases(only, load_libraries())[number]
    inputs = case.make_inputs(torch.device("cuda"), DTYPE)
    for name, implementation in {**case.rivals, **case.implementations}.items():
        if "Triton" in name or "compile" in name or name in case.implementations:
            implementation.call(inputs)
    torch.cuda.synchronize()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill the memory that torch allocates with NaN, which shows what a kernel does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills torch.empty with NaN
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_errors(case: Case, device: torch.device, dtype: torch.dtype = DTYPE) -> dict[str, float]:
    """Run every implementation on the same inputs and return the relative errors against fp64, by name.

    Raises:
        ValueError: an error is too large relative to plain torch's.
    """
    torch.manual_seed(0)
    inputs = case.make_inputs(device, dtype)
    truth = case.truth(inputs)
    baseline = relative_error(case.baseline.to_comparable(case.baseline.call(inputs)), truth)
    errors = {"plain torch": baseline}
    for name, implementation in {**case.implementations, **case.rivals}.items():
        is_own = name in case.implementations
        copies = {key: x.clone() if x.is_contiguous() else x for key, x in inputs.items()}
        with poisoned_memory() if is_own else contextlib.nullcontext():
            out = implementation.call(copies)
        errors[name] = relative_error(implementation.to_comparable(out), truth)
        if not errors[name] <= (MAX_ERROR_RATIO if is_own else MAX_RIVAL_ERROR_RATIO) * baseline:
            raise ValueError(f"{name}: relative L2 {errors[name]:.2e} against fp64, plain torch in bf16 {baseline:.2e}")
    return errors


def measure(case: Case, ceilings: Ceilings) -> list[Row]:
    """Check the errors, then time. Return one row for each of qwenvit's implementations."""
    torch._dynamo.reset()  # all cases compile through one function, whose recompilations are limited
    device = torch.device("cuda")
    errors = check_errors(case, device)
    first = case.make_inputs(device, DTYPE)
    input_sets = [first] + [case.make_inputs(device, DTYPE) for _ in range(input_set_count(first) - 1)]
    memory_users = {**case.implementations, "torch": case.baseline}
    peaks = {name: peak_extra_bytes(one.call, first) for name, one in memory_users.items()}
    kernels = {name: launched_kernels(one.call, first) for name, one in case.implementations.items()}
    timed = {**case.implementations, **case.rivals, **case.lower_bounds}
    seconds = median_seconds({name: one.call for name, one in timed.items()}, input_sets)
    measurement = Measurement(seconds, ceilings, case.minimum_bytes)
    rows = []
    for name in case.implementations:
        moved = case.minimum_bytes + sum(case.pass_bytes.get(kernel, 0) for kernel in kernels[name])
        ideal_seconds = max(case.minimum_bytes / ceilings.copy_bandwidth, case.flops / ceilings.gemm_throughput)
        results = [(target, *target.evaluate(measurement, kernels[name])) for target in case.targets.get(name, ())]
        rows.append({
            "section": case.section, "series": case.series, "title": case.title, "ours": name,
            "tokens": case.tokens, "head_dim": case.head_dim, "kernels": kernels[name],
            "microseconds": seconds[name] * 1e6, "tflops": case.flops / seconds[name] / 1e12,
            "gigabytes": moved / seconds[name] / 1e9, "roofline": ideal_seconds / seconds[name],
            "moved_bytes": moved, "fewest_bytes": case.minimum_bytes, "flops": case.flops,
            "peak_bytes": peaks[name], "torch_peak_bytes": peaks["torch"],
            "rivals": {rival: seconds[rival] * 1e6 for rival in case.rivals},
            "floors": {bound: seconds[bound] * 1e6 for bound in case.lower_bounds},
            "over_best": measurement.speedup(name, *case.rivals), "errors": errors,
            "bars": [
                {"text": target.text, "unit": target.unit, "limit": target.limit, "at_most": target.at_most,
                 "value": value, "met": met} for target, value, met in results
            ],
        })  # fmt: skip
    return rows


def measure_all(
    cases: list[Case], ceilings: Ceilings, keep: Callable[[list[Row], list[str]], None]
) -> tuple[list[Row], list[str]]:
    """Measure the cases and print each row at once. Return the rows, and one line for each case that failed.

    `keep` is called with both after each case.
    """
    rows: list[Row] = []
    failed: list[str] = []
    section = ""
    for number, case in enumerate(cases, 1):
        progress(f"{number}/{len(cases)} {case.section}: {case.title}, S = {case.tokens}")
        try:
            case_rows = measure(case, ceilings)
        except Exception as error:  # noqa: BLE001 (one failure is reported, and the other cases are measured)
            progress("")
            failed.append(f"{case.section}: {case.title}, S = {case.tokens}: not timed: {error}")
            if not isinstance(error, ValueError):
                traceback.print_exc()
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        progress("")
        if case.section != section:
            section = case.section
            same_section = [other for other in cases if other.section == section]
            compared = list(dict.fromkeys(name for one in same_section for name in (*one.rivals, *one.lower_bounds)))
            print(f"\n### {SECTIONS[section]}\n\n{table_header(compared)}")
        for row in case_rows:
            print(table_row(row, compared), flush=True)
        rows += case_rows
        keep(rows, failed)
    return rows, failed


def measure_sections(options: argparse.Namespace) -> Results:
    """Measure the sections of `--only`, print their tables, and return what `--json` gets, also after each case."""
    set_up_compile()
    start = time.monotonic()
    libraries = load_libraries(options.fa3, options.fa4)
    cases = all_cases(options.only, libraries)
    compile_times = measure_compile_times(MODELS) if "compile" in options.only else []
    run_in_processes(compile_case, options.only, len(cases))  # `measure_all` reports the cases that fail here
    compiled = time.monotonic()
    ceilings = measure_ceilings()
    machine = header(ceilings, options.commit)
    print(f"{machine}\n\n{HOW_RIVALS_RUN}")
    if {"windows", "full", "lengths", "segments"} & set(options.only):
        for library in (name for name in ("FA3", "FA4") if name not in libraries):
            print(f"\n{library} is left out: it was not given (--{library.lower()}).")
    if compile_times:
        print(compile_table(compile_times))
    results: Results = {"header": machine, "compile": compile_times, "means": []}

    def keep(rows: list[Row], failed: list[str]) -> None:
        save(options.json, results | {"rows": rows, "failed": failed})

    rows, failed = measure_all(cases, ceilings, keep)
    if "compile" in options.only:
        failed += [f"compile: {name}: not timed" for name in set(MODELS) - {row["model"] for row in compile_times}]
    means = mean_over_fa4(rows, cases)
    met = [bar["met"] for bar in (*(bar for row in rows for bar in row["bars"]), *means)]
    measured = f"{len(cases) - len(failed)} of {len(cases)} cases measured"
    took = f"{time.monotonic() - start:.0f} s, of which {compiled - start:.0f} s compiling"
    print("".join(f"\n{bar_text(mean)}\n" for mean in means))
    print(f"{sum(met)} of {len(met)} targets met; {measured} in {took}.")
    print("\n".join(failed))
    return results | {"rows": rows, "means": means, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
                        help=f"sections to run, of {', '.join(SECTIONS)}; default: all")  # fmt: skip
    parser.add_argument("--fa3", type=Path, help="library of FlashAttention 3 (_vllm_fa3_C), for its columns")
    parser.add_argument("--fa4", type=Path, help="folder to import flash-attn-4 from, for the columns of FA4")
    add_report_arguments(parser)
    options = parser.parse_args()
    if options.read:
        results = merge(json.loads(file.read_text()) for file in options.read)
        print(block(results))
    else:
        require_gpu("bench_kernels.py")
        results = measure_sections(options)
    save(options.json, results)
    if options.chart:
        draw_chart(results["rows"], results["header"].partition(",")[0], options.chart)
    if options.page:
        rewrite(options.page, KERNELS_MARKERS, block(results))
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
