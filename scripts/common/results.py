"""What benchmarks have in common on the command line: what to measure, and figures as JSON."""

import argparse
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

Results = list[dict[str, Any]]


def add_arguments(
    parser: argparse.ArgumentParser, models: Collection[str], cases: Collection[str], *, chart: bool = True
) -> None:
    """Add the arguments of a benchmark of models: which to measure, and those of `add_report_arguments`."""
    parser.add_argument("--models", nargs="+", choices=models, default=list(models), metavar="MODEL",
                        help=f"of {', '.join(models)}; default: all")  # fmt: skip
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, metavar="CASE",
                        help=f"of {', '.join(cases)}; default: all")  # fmt: skip
    add_report_arguments(parser, chart=chart)


def add_report_arguments(parser: argparse.ArgumentParser, *, chart: bool = True) -> None:
    """Add the arguments that say where figures come from and go to, and `--chart` for benchmarks that draw one."""
    parser.add_argument("--read", type=Path, nargs="+", metavar="JSON", help="measure nothing: report earlier figures")
    parser.add_argument("--json", type=Path, help="write all figures there")
    if chart:
        parser.add_argument("--chart", type=Path, help="write a chart there (PNG; needs matplotlib)")
    parser.add_argument("--page", type=Path, help="rewrite the block of BENCHMARKS.md between its two markers")
    parser.add_argument("--commit", help="what to print as the commit where the checkout has no .git")


def require_gpu(script: str) -> None:
    """Raise SystemExit if there is no GPU to measure on."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{script}: needs a GPU, and torch sees none (--read reports earlier figures)")


def read_or_measure(
    script: str, options: argparse.Namespace, measure: Callable[[argparse.Namespace], Results]
) -> Results:
    """Return the figures in the files of `--read`, or measure them.

    Raises:
        SystemExit: there is no GPU to measure on.
    """
    if options.read:
        return [result for file in options.read for result in json.loads(file.read_text())]
    require_gpu(script)
    return measure(options)


def save(path: Path | None, results: Results | dict[str, Any]) -> None:
    """Write figures as JSON, if there is a path: the file is complete at any time, whatever becomes of this process."""
    if path:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        partial.replace(path)
