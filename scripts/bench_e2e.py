"""Time whole vision towers, ours and others', on one GPU, in one run; then say which bars are met.

Weights are seeded, shapes the registry's. Results are compared with fp32 first: where ours are further from it than
1.05 times transformers' own, no speedup is printed. Prints markdown; progress goes to stderr. Several models run in
processes of their own, one after another, a few minutes each.

    python scripts/bench_e2e.py --fa3 fa3.so --timm FOLDER --vllm FOLDER --json towers.json
    python scripts/bench_e2e.py --read towers.json --readme README.md --chart scripts/readme/towers.png
"""

import argparse
import json
from pathlib import Path

import torch

from common.machine import ceilings
from e2e.cases import MODELS
from e2e.chart import draw
from e2e.jobs import case_names, run_apart, run_model
from e2e.report import block, profile_tables, rewrite
from e2e.verdicts import Result
from peers.attention import load_fa3
from peers.towers import NAMES


def measure(options: argparse.Namespace) -> list[Result]:
    """One model here, several in processes of their own; `--json` is written as figures come."""

    def keep(results: list[Result]) -> None:
        if options.json:
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1))
            partial.replace(options.json)  # whole at any time, whatever becomes of this process

    if len(options.models) > 1:
        results: list[Result] = []
        for model in options.models:
            results.append(run_apart(model, options, Path(__file__)))
            keep(results)
        return results
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if options.fa3:
        load_fa3(options.fa3)
    return [run_model(options.models[0], options, ceilings(), lambda result: keep([result]))]


def main() -> None:
    cases = case_names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL",
                        help=f"of {', '.join(MODELS)}; default: all")  # fmt: skip
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, metavar="CASE",
                        help=f"of {', '.join(cases)}; default: all")  # fmt: skip
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
    elif torch.cuda.is_available():
        results = measure(options)
    else:
        raise SystemExit("bench_e2e.py: needs a GPU, and torch sees none (--read reports earlier figures)")
    print(block(results))
    print("\n".join(profile_tables(result) for result in results))
    if options.chart:
        draw(results, options.chart)
    if options.readme:
        rewrite(options.readme, block(results))
    if any(result["failed"] or not all(row["passed"] for row in result["rows"]) for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
