"""Time every kernel against the best that others offer for the same work, on one GPU, in one run.

Rivals: attention by cuDNN (SDPA), FlashAttention 2 (torch's) and, where its library is given, 3, each after RoPE in
torch or in a fused Triton pass; cuBLAS with what has to follow it; torch's own sequences, and torch.compile of them.
Results are compared with fp64 first: a case whose error is more than 1.05 times that of plain torch in bf16 gets no
figures. Prints markdown tables; progress goes to stderr.

Our kernels rotate neighbouring channels (2i, 2i + 1), as towers have them whose QKV weights were permuted at load;
rivals with RoPE in torch get channels (i, i + D/2), as transformers has them, and those with a Triton pass what is
faster for it. Rows "pairs as halves" are the unpermuted layout for all.
"""

import argparse
import contextlib
import gc
import json
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch._dynamo

from common.jobs import parallel, progress
from common.machine import Ceilings, ceilings
from kernel_bench.attention_cases import attention_cases
from kernel_bench.cases import DTYPE, Case, Figures, relative_error
from kernel_bench.compile_time import MODELS, compile_times
from kernel_bench.pass_cases import pass_cases
from kernel_bench.patch_cases import patch_cases
from kernel_bench.projection_cases import projection_cases
from kernel_bench.report import SECTIONS, Row, compile_table, draw, table_head, table_row
from kernel_bench.timing import header, kernels_of, medians, peak_bytes, set_count
from peers.attention import FLAGS, load_fa3
from peers.torch_compile import set_up_compile

OURS = 1.05
"""Most that our error may be of plain torch's."""
RIVALS = 3.0
"""The same for rivals, which are to do the same work but not held to our standard."""


def all_cases(only: list[str], fa3: Path | None) -> list[Case]:
    cases = attention_cases(fa3) + projection_cases() + pass_cases() + patch_cases()
    return sorted((case for case in cases if case.section in only), key=lambda case: list(SECTIONS).index(case.section))


def compile_case(only: list[str], number: int) -> None:
    """Run what compiles."""
    set_up_compile()
    case = all_cases(only, None)[number]
    inputs = case.inputs(torch.device("cuda"), DTYPE)
    for name, run in {**case.rivals, **case.ours}.items():
        if "Triton" in name or "compile" in name or name in case.ours:
            run.call(inputs)
    torch.cuda.synchronize()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out is full of NaN: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which, beside what its name says, fills torch.empty
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(case: Case, device: torch.device, dtype: torch.dtype = DTYPE) -> dict[str, float]:
    """Errors of all contenders against fp64; ValueError where one is too large. Every one starts from the same."""
    torch.manual_seed(0)
    inputs = case.inputs(device, dtype)
    truth = case.truth(inputs)
    stick = relative_error(case.stick.finish(case.stick.call(inputs)), truth)
    errors = {"plain torch": stick}
    for name, run in {**case.ours, **case.rivals}.items():
        own = {key: x.clone() if x.is_contiguous() else x for key, x in inputs.items()}
        with poisoned_memory() if name in case.ours else contextlib.nullcontext():
            out = run.call(own)
        errors[name] = relative_error(run.finish(out), truth)
        if not errors[name] <= (OURS if name in case.ours else RIVALS) * stick:
            raise ValueError(f"{name}: relative L2 {errors[name]:.2e} against fp64, plain torch in bf16 {stick:.2e}")
    return errors


def measure(case: Case, limits: Ceilings) -> list[Row]:
    """Check, then time; a row for each of `ours`."""
    torch._dynamo.reset()  # its limit of recompilations is for one function's sake, and ours share theirs
    device = torch.device("cuda")
    errors = check(case, device)
    first = case.inputs(device, DTYPE)
    sets = [first] + [case.inputs(device, DTYPE) for _ in range(set_count(first) - 1)]
    runs = {**case.ours, **case.rivals, **case.floors}
    peaks = {name: peak_bytes(run.call, first) for name, run in {**case.ours, "torch": case.stick}.items()}
    kernels = {name: kernels_of(run.call, first) for name, run in case.ours.items()}
    seconds = medians({name: run.call for name, run in runs.items()}, sets)
    figures = Figures(seconds, limits, case.fewest_bytes)
    rows = []
    for name in case.ours:
        moved = case.fewest_bytes + sum(case.pass_bytes.get(kernel, 0) for kernel in kernels[name])
        ideal = max(case.fewest_bytes / limits.copy, case.flops / limits.gemm)
        verdicts = [(bar, *bar.verdict(figures, kernels[name])) for bar in case.bars.get(name, ())]
        rows.append({
            "section": case.section, "series": case.series, "title": case.title, "ours": name,
            "tokens": case.tokens, "head_dim": case.head_dim, "kernels": kernels[name],
            "microseconds": seconds[name] * 1e6, "tflops": case.flops / seconds[name] / 1e12,
            "gigabytes": moved / seconds[name] / 1e9, "roofline": ideal / seconds[name],
            "moved_bytes": moved, "fewest_bytes": case.fewest_bytes, "flops": case.flops,
            "peak_bytes": peaks[name], "torch_peak_bytes": peaks["torch"],
            "rivals": {rival: seconds[rival] * 1e6 for rival in case.rivals},
            "floors": {floor: seconds[floor] * 1e6 for floor in case.floors},
            "over_best": figures.over(name, *case.rivals), "errors": errors,
            "bars": [
                {"text": bar.text, "unit": bar.unit, "limit": bar.limit, "at_most": bar.at_most,
                 "value": value, "met": met} for bar, value, met in verdicts
            ],
        })  # fmt: skip
    return rows


def measure_all(cases: list[Case], limits: Ceilings) -> tuple[list[Row], list[str]]:
    """Rows, printed as they come, and what failed."""
    rows: list[Row] = []
    failed: list[str] = []
    section = ""
    for number, case in enumerate(cases, 1):
        progress(f"{number}/{len(cases)} {case.section}: {case.title}, S = {case.tokens}")
        try:
            found = measure(case, limits)
        except Exception as error:  # noqa: BLE001 (one failure is reported, and the other cases are measured)
            progress("")
            failed.append(f"{case.section}: {case.title}, S = {case.tokens}: no figures: {error}")
            if not isinstance(error, ValueError):
                traceback.print_exc()
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        progress("")
        if case.section != section:
            section, own = case.section, [other for other in cases if other.section == case.section]
            columns = list(dict.fromkeys(name for other in own for name in (*other.rivals, *other.floors)))
            print(f"\n### {SECTIONS[section]}\n\n{table_head(columns)}")
        for row in found:
            print(table_row(row, columns), flush=True)
        rows += found
    return rows, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
                        help=f"sections to run, of {', '.join(SECTIONS)}; default: all")  # fmt: skip
    parser.add_argument("--fa3", type=Path, help="library with FlashAttention 3 (_vllm_fa3_C), for its columns")
    parser.add_argument("--chart", type=Path, help="write a chart there (PNG; needs matplotlib)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--commit", help="what to print as the commit where the checkout has no .git")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py: needs a GPU, and torch sees none")
    set_up_compile()
    start = time.monotonic()
    cases = all_cases(options.only, options.fa3)
    cold = compile_times(MODELS) if "compile" in options.only else []
    parallel(compile_case, options.only, len(cases))  # what fails is said where the case is measured
    compiled = time.monotonic()
    limits = ceilings()
    print(f"{header(limits, options.commit)}\n\n{FLAGS}")
    if options.fa3:
        load_fa3(options.fa3)
    elif {"windows", "full", "lengths", "segments"} & set(options.only):
        print("\nFlashAttention 3 is left out: no library was given (--fa3).")
    if cold:
        print(compile_table(cold))
    rows, failed = measure_all(cases, limits)
    if "compile" in options.only:
        failed += [f"compile: {name}: no figures" for name in set(MODELS) - {found["model"] for found in cold}]
    met = [bar["met"] for row in rows for bar in row["bars"]]
    took = f"{time.monotonic() - start:.0f} s, of which {compiled - start:.0f} s compiling"
    print(f"\n{sum(met)} of {len(met)} bars met; {len(cases) - len(failed)} of {len(cases)} cases measured in {took}.")
    print("\n".join(failed))
    if options.json:
        everything = {"header": header(limits, options.commit), "compile": cold, "rows": rows, "failed": failed}
        options.json.write_text(json.dumps(everything, indent=1))
    if options.chart:
        draw(rows, torch.cuda.get_device_name(), options.chart)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
