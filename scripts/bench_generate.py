"""Time transformers models until their first token, with their own vision tower and with qwenvit's, on one GPU.

Models have official shapes, seeded weights and some of their text layers (--text-layers). Each is compared with itself
in fp32 first: where outputs, log-probabilities or tokens differ by more than rounding, no time is printed. Then says
which bars are met. Prints markdown; progress goes to stderr.

    python scripts/bench_generate.py --json generate.json
    python scripts/bench_generate.py --read generate.json --page BENCHMARKS.md
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from common.machine import Ceilings, describe_machine, measure_ceilings
from common.pages import rewrite
from common.progress import progress
from common.results import add_arguments, read_or_measure, save
from common.steps import steps_of
from generate_bench.measure import GenerateBench
from generate_bench.models import CASES, MODELS, build_model, cases_for, check_text_layers, official_config
from generate_bench.report import GENERATE_MARKERS, Result, block, empty_result
from peers.attention import fa2, fa3, load_libraries
from peers.rivals import RIVAL_NAMES
from peers.transformers_towers import register_attention


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure the models one after another; write `--json` after each step."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    load_libraries(options.fa3, None)
    limits = measure_ceilings()
    results: list[Result] = []

    def save_with(result: Result) -> None:
        save(options.json, [*results, result])

    for model in options.models:
        results += [run_model(model, options, limits, save_with)]
    return results


def load_bench(model: str, options: argparse.Namespace) -> GenerateBench:
    """Return a model with qwenvit's fast tower, and with FlashAttention in its own."""
    functions = {"fa2": fa2, "fa3": fa3} if options.fa3 else {"fa2": fa2}
    names = {RIVAL_NAMES[kind]: register_attention(f"flash_{kind}", run) for kind, run in functions.items()}
    return GenerateBench(build_model(official_config(model, options.text_layers)), "triton", names)


def run_model(model: str, options: argparse.Namespace, limits: Ceilings, save: Callable[[Result], None]) -> Result:
    """Measure the cases of one model. One that fails is listed under `failed`, and the next run.

    Args:
        model: a key of MODELS.
        options: the command's options.
        limits: the machine's ceilings.
        save: called with all figures so far, after each step.
    """
    host, _, ceilings = describe_machine(limits, options.commit).partition("\n\n")
    result = empty_result(model, options.text_layers) | {"machine": host, "ceilings": ceilings}
    step, bench = steps_of(result, save), None
    with step("weights"):
        bench = load_bench(model, options)
        result["extra_bytes"] = bench.extra_bytes
    if bench is not None:
        for case in (case for case in cases_for(bench.encoder.config) if case.name in options.cases):
            with step(case.name):
                result["rows"].append(bench.measure(case))
    progress("")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, MODELS, CASES, chart=False)
    parser.add_argument("--text-layers", type=int, default=4, metavar="N",
                        help="layers of the language model; default: %(default)s")  # fmt: skip
    parser.add_argument("--fa3", type=Path, help="library with FlashAttention 3 (_vllm_fa3_C)")
    options = parser.parse_args()
    try:
        for model in options.models:
            check_text_layers(model, options.text_layers)
    except ValueError as error:
        parser.error(str(error))
    results = read_or_measure("bench_generate.py", options, measure)
    print(block(results, for_readers=False))
    if options.page:
        rewrite(options.page, GENERATE_MARKERS, block(results, for_readers=True))
    if any(result["failed"] for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
