"""Time whole vision towers, ours and others', on one GPU, in one run; then say which bars are met.

Weights are seeded, shapes the registry's. Results are compared with fp32 first: where ours are further from it than
1.05 times transformers' own, no speedup is printed. Prints markdown; progress goes to stderr.

    python scripts/bench_e2e.py --models Qwen3-VL-8B --fa3 fa3.so --timm FOLDER --vllm FOLDER --json qwen3-8b.json
    python scripts/bench_e2e.py --read *.json --readme README.md --chart scripts/readme/towers.png
"""

import argparse
import contextlib
import gc
import json
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from e2e_cases import MODELS, all_cases, read_vllm
from e2e_report import Result, block, draw, judged, profile_tables, rewrite
from e2e_rivals import NAMES
from e2e_towers import Bench, first_line
from kernel_baselines import load_fa3
from kernel_jobs import progress
from kernel_timing import Ceilings, ceilings, machine

from qwenvit.registry import published_config

SIZES, PROFILE = "random sizes", "profile"
PROFILED = ("448²", "1344²")


def run_model(model: str, options: argparse.Namespace, limits: Ceilings) -> Result:
    """Everything about one model; what fails is named, and the rest is measured."""
    progress(f"{model}: weights and parity")
    bench = Bench(model, options)
    vllm = read_vllm(options.vllm) if options.vllm else {}
    worst = max(bench.gate, key=lambda check: check.value / check.bound if check.bound else check.value)
    result: Result = {
        "model": model, "machine": machine(limits, options.commit), "gemm": limits.gemm, "load": bench.load,
        "gate": f"{sum(c.passed for c in bench.gate)} of {len(bench.gate)} checks pass, nearest its bound: "
        f"{worst.name} {worst.value:.3g} (≤ {worst.bound:g})",
        "rows": [], "sizes": [], "profiles": {}, "failed": [],
    }  # fmt: skip

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        progress(f"{model}: {name}")
        try:
            yield
        except Exception as error:  # noqa: BLE001 (one failure is reported, and the rest is measured)
            progress("")
            traceback.print_exc()
            result["failed"].append(f"{name}: {first_line(error)}")
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    for case in (case for case in all_cases(bench.config) if case.name in options.cases):
        with part(case.name):
            row = bench.measure(case)
            own = vllm.get((model, case.patches, bool(case.frames)), {}) if len(case.grid) == 1 else {}
            row["times"] |= {name: {"median": seconds} for name, seconds in own.items()}
            if not own:
                row["missing"]["vLLM"] = "its own bench has not this case" if vllm else "no figures were given (--vllm)"
            result["rows"].append(row)
        if case.name in PROFILED and PROFILE in options.cases:
            with part(f"{PROFILE} of {case.name}"):
                result["profiles"][case.name] = bench.profile(case)
    if SIZES in options.cases:
        with part(SIZES):
            result["sizes"] = bench.sizes()
    progress("")
    return result


def main() -> None:
    names = [case.name for case in all_cases(published_config(next(iter(MODELS.values()))))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL",
                        help=f"of {', '.join(MODELS)}; default: all")  # fmt: skip
    parser.add_argument("--cases", nargs="+", choices=[*names, SIZES, PROFILE], default=[*names, SIZES, PROFILE],
                        metavar="CASE", help=f"of {', '.join([*names, SIZES, PROFILE])}; default: all")  # fmt: skip
    parser.add_argument("--rivals", nargs="*", choices=NAMES, default=list(NAMES), metavar="RIVAL",
                        help=f"of {', '.join(NAMES)}; default: all")  # fmt: skip
    parser.add_argument("--fa3", type=Path, help="library with FlashAttention 3 (_vllm_fa3_C)")
    parser.add_argument("--timm", type=Path, help="folder to import timm 1.0.31 from")
    parser.add_argument("--vllm", type=Path, help="JSON files of vLLM's own bench on the same machine")
    parser.add_argument("--read", type=Path, nargs="+", metavar="JSON", help="measure nothing: report earlier figures")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--chart", type=Path, help="write a chart there (PNG; needs matplotlib)")
    parser.add_argument("--readme", type=Path, help="rewrite the block of a README between its two markers")
    parser.add_argument("--commit", help="what to print as the commit where the checkout has no .git")
    options = parser.parse_args()
    if options.read:
        results = [result for file in options.read for result in json.loads(file.read_text())]
    else:
        if not torch.cuda.is_available():
            raise SystemExit("bench_e2e.py: needs a GPU, and torch sees none (--read reports earlier figures)")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        if options.fa3:
            load_fa3(options.fa3)
        limits, results = ceilings(), []
        for model in options.models:
            results.append(run_model(model, options, limits))
            torch._dynamo.reset()
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    print(block(results))
    print("\n".join(profile_tables(result) for result in results))
    met = [met for result in results for met in judged(result)]
    print(f"\n{sum(met)} of {len(met)} bars met.")
    if options.chart:
        draw(results, options.chart)
    if options.readme:
        rewrite(options.readme, block(results))
    if any(result["failed"] or not all(row["passed"] for row in result["rows"]) for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
