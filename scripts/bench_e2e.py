"""Time whole vision towers, qwenvit's and its rivals', on one GPU, in one run; then say which bars are met.

Weights are seeded, shapes are those of published models. Results are compared with fp32 first: where qwenvit's error is
above 1.05 times transformers', no speedup is printed. Prints markdown; progress goes to stderr. With several models,
each runs in a process of its own, one after another, a few minutes each.

    python scripts/bench_e2e.py --fa3 fa3.so --fa4 FOLDER --timm FOLDER --vllm FOLDER --json towers.json
    python scripts/bench_e2e.py --read scripts/readme/towers.json --page BENCHMARKS.md --readme README.md
    python scripts/bench_e2e.py --read scripts/readme/towers.json --chart scripts/readme/towers.png
"""

import argparse
from pathlib import Path

import torch

from common.machine import measure_ceilings
from common.pages import rewrite
from common.results import add_arguments, read_or_measure, save
from e2e.cases import MODELS
from e2e.chart import draw
from e2e.model_run import case_names, run_in_new_process, run_model
from e2e.report import SPEED_MARKERS, TOWERS_MARKERS, block, profile_tables, speed_table
from e2e.verdicts import Result
from peers.attention import load_libraries
from peers.rivals import RIVAL_NAMES


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure one model here, or several in processes of their own; write `--json` after each step."""
    if len(options.models) > 1:
        results: list[Result] = []
        for model in options.models:
            results.append(run_in_new_process(model, options, Path(__file__)))
            save(options.json, results)
        return results
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    load_libraries(options.fa3, options.fa4)
    return [run_model(options.models[0], options, measure_ceilings(), lambda result: save(options.json, [result]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, MODELS, case_names())
    parser.add_argument("--rivals", nargs="*", choices=RIVAL_NAMES, default=list(RIVAL_NAMES), metavar="RIVAL",
                        help=f"of {', '.join(RIVAL_NAMES)}; default: all")  # fmt: skip
    parser.add_argument("--fa3", type=Path, help="library with FlashAttention 3 (_vllm_fa3_C)")
    parser.add_argument("--fa4", type=Path, help="folder to import flash-attn-4 from")
    parser.add_argument("--timm", type=Path, help="folder to import timm 1.0.31 from")
    parser.add_argument("--vllm", type=Path, help="JSON files of vLLM's own bench on the same machine")
    parser.add_argument("--readme", type=Path, help="rewrite the speed table of README.md between its two markers")
    options = parser.parse_args()
    results = read_or_measure("bench_e2e.py", options, measure)
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
