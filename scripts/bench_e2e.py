"""Time whole vision towers, qwenvit's and its rivals', on one GPU, in one run; then say which bars are met.

Weights are seeded, shapes are those of published models. Results are compared with fp32 first: where qwenvit's error is
above 1.05 times transformers', no speedup is printed. Prints markdown; progress goes to stderr. With several models,
each runs in a process of its own, one after another, a few minutes each.

    python scripts/bench_e2e.py --fa3 fa3.so --timm FOLDER --vllm FOLDER --json towers.json
    python scripts/bench_e2e.py --read scripts/readme/towers.json --page BENCHMARKS.md --readme README.md
    python scripts/bench_e2e.py --read scripts/readme/towers.json --chart scripts/readme/towers.png
"""

import argparse
import json
from pathlib import Path

import torch

from common.machine import measure_ceilings
from common.pages import rewrite
from e2e.cases import MODELS
from e2e.chart import draw
from e2e.model_run import case_names, run_in_new_process, run_model
from e2e.report import SPEED_MARKERS, TOWERS_MARKERS, block, profile_tables, speed_table
from e2e.verdicts import Result
from peers.attention import load_fa3
from peers.rivals import RIVAL_NAMES


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure one model here, or several in processes of their own; write `--json` after each step."""

    def save(results: list[Result]) -> None:
        if options.json:
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1))
            partial.replace(options.json)  # the file is complete at any time, whatever becomes of this process

    if len(options.models) > 1:
        results: list[Result] = []
        for model in options.models:
            results.append(run_in_new_process(model, options, Path(__file__)))
            save(results)
        return results
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if options.fa3:
        load_fa3(options.fa3)
    return [run_model(options.models[0], options, measure_ceilings(), lambda result: save([result]))]


def main() -> None:
    cases = case_names()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL",
                        help=f"of {', '.join(MODELS)}; default: all")  # fmt: skip
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, metavar="CASE",
                        help=f"of {', '.join(cases)}; default: all")  # fmt: skip
    parser.add_argument("--rivals", nargs="*", choices=RIVAL_NAMES, default=list(RIVAL_NAMES), metavar="RIVAL",
                        help=f"of {', '.join(RIVAL_NAMES)}; default: all")  # fmt: skip
    parser.add_argument("--fa3", type=Path, help="library with FlashAttention 3 (_vllm_fa3_C)")
    parser.add_argument("--timm", type=Path, help="folder to import timm 1.0.31 from")
    parser.add_argument("--vllm", type=Path, help="JSON files of vLLM's own bench on the same machine")
    parser.add_argument("--read", type=Path, nargs="+", metavar="JSON", help="measure nothing: report earlier figures")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--chart", type=Path, help="write a chart there (PNG; needs matplotlib)")
    parser.add_argument("--page", type=Path, help="rewrite the block of BENCHMARKS.md between its two markers")
    parser.add_argument("--readme", type=Path, help="rewrite the speed table of README.md between its two markers")
    parser.add_argument("--commit", help="what to print as the commit where the checkout has no .git")
    options = parser.parse_args()
    if options.read:
        results = [result for file in options.read for result in json.loads(file.read_text())]
    elif torch.cuda.is_available():
        results = measure(options)
    else:
        raise SystemExit("bench_e2e.py: needs a GPU, and torch sees none (--read reports earlier figures)")
    print(block(results, for_readers=False))
    print("\n".join(profile_tables(result) for result in results))
    if options.chart:
        draw(results, options.chart)
    if options.page:
        rewrite(options.page, TOWERS_MARKERS, block(results, for_readers=True))
    if options.readme:
        rewrite(options.readme, SPEED_MARKERS, speed_table(results))
    if any(result["failed"] or not all(row["passed"] for row in result["rows"]) for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
