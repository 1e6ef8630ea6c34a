"""Time vLLM with qwenvit's plugin and without: its vision tower alone, and whole requests until their first token.

Engines of all modes run on one GPU with the same seeded weights of official shapes. Their results are compared with
transformers' tower in fp32 first: where an error is above that of vLLM's own tower by more than rounding, no ratio is
printed. Then says which bars are met. Prints markdown; progress goes to stderr. Needs vLLM. Figures are written after
each step, and an engine that fails costs none of the others.

    python scripts/bench_vllm.py --json vllm.json
    python scripts/bench_vllm.py --parts tower --models Qwen2.5-VL-7B --cases 448² 896² --json tower.json
    python scripts/bench_vllm.py --read vllm.json --page BENCHMARKS.md
"""

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common.machine import describe_machine, measure_ceilings
from common.pages import rewrite
from common.results import Results, add_arguments, read_or_measure, save
from generate_bench.models import TEXT_CONFIGS, check_text_layers
from vllm_bench.cases import CASES, MODELS, MODES, PARTS
from vllm_bench.model_run import run_model
from vllm_bench.report import VLLM_MARKERS, block
from vllm_bench.verdicts import passed

TINY_LAYERS = 4
"""Text layers of `--tiny`: at least as many as levels of DeepStack."""


def measure(options: argparse.Namespace) -> Results:
    """Measure the models one after another; write `--json` after each step."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench_vllm.py: ended from outside"))  # and so end the engines
    deadline = time.monotonic() + options.seconds
    if options.tiny:
        machine = (
            f"CPU, {torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}"
        )
    else:
        machine = describe_machine(measure_ceilings(), options.commit).partition("\n\n")[0]
        torch.cuda.empty_cache()
    results: Results = []

    def save_with(result: dict[str, Any]) -> None:
        save(options.json, [*results, result])

    for index, model in enumerate(options.models):
        share = (deadline - time.monotonic()) / (len(options.models) - index)  # a model must not take another's time
        results += [run_model(model, options, machine, time.monotonic() + share, save_with)]
    return results


def add_options(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser, MODELS, CASES, chart=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}; default: both")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE",
                        help=f"of {', '.join(MODES)}; default: all")  # fmt: skip
    parser.add_argument("--text-layers", type=int, metavar="N", help="layers of the language model; default: all")
    parser.add_argument("--rounds", type=int, default=2, metavar="N",
                        help="how often the engines take turns at each case; default: %(default)s")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=540.0, metavar="S",
                        help="stop measuring after that long, and report; default: %(default)s")  # fmt: skip
    parser.add_argument("--start-seconds", type=float, default=240.0, metavar="S",
                        help="give up on engines that are not ready by then; default: %(default)s")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "bench_vllm"), metavar="FOLDER",
                        help="for checkpoints, logs and what vLLM compiles; default: %(default)s")  # fmt: skip
    parser.add_argument("--llm", type=json.loads, default={}, metavar="JSON", help="more arguments of vllm.LLM")
    parser.add_argument("--tiny", action="store_true", help="small widths in fp32 on the CPU: tries the script")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    layers = TINY_LAYERS if options.tiny else options.text_layers
    given = {model: layers or TEXT_CONFIGS[model]["num_hidden_layers"] for model in options.models}
    options.text_layers = given
    try:
        for model, count in given.items():
            check_text_layers(model, count)
    except ValueError as error:
        parser.error(str(error))
    measure_here = options.tiny and not options.read
    results = measure(options) if measure_here else read_or_measure("bench_vllm.py", options, measure)
    print(block(results, for_readers=False))
    if options.page:
        rewrite(options.page, VLLM_MARKERS, block(results, for_readers=True))
    if not all(map(passed, results)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
