"""Time the whole path from JPEG files to embeddings on one GPU, in one run; then say which bars are met.

Makes folders of JPEG files, and compares `Encoder.encode` with the tower alone and with transformers' processor in
front of the same tower and of its own. Weights are seeded, shapes are those of published models. Pixel values and
embeddings are compared first: where they are not equal, no time is printed. Prints markdown; progress goes to stderr.

    python scripts/bench_encode.py --json encode.json
    python scripts/bench_encode.py --read encode.json --page BENCHMARKS.md --chart scripts/readme/encode.png
"""

import argparse
import tempfile
from pathlib import Path

import torch

from common.machine import measure_ceilings
from common.pages import rewrite
from common.progress import progress
from common.results import add_arguments, read_or_measure, save
from encode_bench.chart import draw
from encode_bench.folders import make_folder, photographs
from encode_bench.model_run import CASES, MODELS, folders_for, run_model
from encode_bench.report import ENCODE_MARKERS, block
from encode_bench.verdicts import Result


def measure(options: argparse.Namespace) -> list[Result]:
    """Make the folders and measure the models one after another; write `--json` after each step."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    results: list[Result] = []

    def save_with(result: Result) -> None:
        save(options.json, [*results, result])

    with tempfile.TemporaryDirectory() as parent:
        source, pictures = photographs()
        folders = folders_for(options.cases)
        files = {folder.name: make_folder(folder, Path(parent), pictures, progress) for folder in folders}
        limits = measure_ceilings()
        for model in options.models:
            results += [run_model(model, options, limits, files, source, save_with)]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, MODELS, CASES)
    options = parser.parse_args()
    results = read_or_measure("bench_encode.py", options, measure)
    print(block(results, for_readers=False))
    if options.chart:
        draw(results, options.chart)
    if options.page:
        rewrite(options.page, ENCODE_MARKERS, block(results, for_readers=True))
    if any(result["failed"] for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
