"""Time the whole path from JPEG files to embeddings on one GPU, in one run; then say which bars are met.

Makes folders of JPEG files, and compares `Encoder.encode` with the tower alone and with transformers' processor in
front of the same tower and of its own. Weights are seeded, shapes are those of published models. Pixel values and
embeddings are compared first: where they are not equal, no time is printed. Prints markdown; progress goes to stderr.

    python scripts/bench_encode.py --json encode.json
    python scripts/bench_encode.py --read encode.json --page BENCHMARKS.md --chart scripts/readme/encode.png
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from common.machine import measure_ceilings
from common.pages import rewrite
from common.progress import progress
from encode_bench.chart import draw
from encode_bench.folders import make_folder, photographs
from encode_bench.model_run import CASES, MODELS, folders_for, run_model
from encode_bench.report import ENCODE_MARKERS, block
from encode_bench.verdicts import Result


def measure(options: argparse.Namespace) -> list[Result]:
    """Make the folders and measure the models one after another; write `--json` after each step."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    results: list[Result] = []

    def save(result: Result) -> None:
        if options.json:
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps([*results, result], indent=1))
            partial.replace(options.json)  # the file is complete at any time, whatever becomes of this process

    with tempfile.TemporaryDirectory() as parent:
        source, pictures = photographs()
        folders = folders_for(options.cases)
        files = {folder.name: make_folder(folder, Path(parent), pictures, progress) for folder in folders}
        limits = measure_ceilings()
        for model in options.models:
            results += [run_model(model, options, limits, files, source, save)]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL",
                        help=f"of {', '.join(MODELS)}; default: all")  # fmt: skip
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE",
                        help=f"of {', '.join(CASES)}; default: all")  # fmt: skip
    parser.add_argument("--read", type=Path, nargs="+", metavar="JSON", help="measure nothing: report earlier figures")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--chart", type=Path, help="write a chart there (PNG; needs matplotlib)")
    parser.add_argument("--page", type=Path, help="rewrite the block of BENCHMARKS.md between its two markers")
    parser.add_argument("--commit", help="what to print as the commit where the checkout has no .git")
    options = parser.parse_args()
    if options.read:
        results = [result for file in options.read for result in json.loads(file.read_text())]
    elif torch.cuda.is_available():
        results = measure(options)
    else:
        raise SystemExit("bench_encode.py: needs a GPU, and torch sees none (--read reports earlier figures)")
    print(block(results, for_readers=False))
    if options.chart:
        draw(results, options.chart)
    if options.page:
        rewrite(options.page, ENCODE_MARKERS, block(results, for_readers=True))
    if any(result["failed"] for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
