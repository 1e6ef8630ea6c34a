"""`qwenvit encode`: a job whose output is a folder of shards, or a few images whose output is one file."""

import argparse
import sys
from pathlib import Path
from typing import Any

from qwenvit.cli.loading import CommandError, checkpoint_options, hub_options, pixel_bounds
from qwenvit.cli.progress import ProgressLine, duration
from qwenvit.cli.single_file import encode_to_file
from qwenvit.cli.terminal import printable, say
from qwenvit.datasets.failures import NAME as ERRORS_NAME
from qwenvit.datasets.job import encode_dataset
from qwenvit.datasets.manifest import Manifest
from qwenvit.datasets.progress import ItemReport, Progress
from qwenvit.datasets.signals import Interrupted

MAX_ERROR_LINES = 20
"""Failures that are named one by one without `--verbose`; all are in `errors.jsonl`."""
JOB_OPTIONS = {
    "format": "safetensors",
    "pool": None,
    "normalize": False,
    "tokens": True,
    "shard_images": 10_000,
    "shard_bytes": 2**30,
    "devices": None,
}
"""Options that only a folder of shards has, and their defaults."""


def encode(arguments: argparse.Namespace) -> int:
    """Embed what the inputs lead to; name and skip broken images, which make the exit code 1."""
    target: Path = arguments.output
    if target.is_dir() or not target.suffix:
        return _encode_to_folder(arguments)
    if target.suffix != ".safetensors":
        raise CommandError(
            f"--output: expected a folder or a file called *.safetensors, got {target}; make a folder with a dot in "
            "its name first"
        )
    if given := [name for name, default in JOB_OPTIONS.items() if getattr(arguments, name) != default]:
        option = "no-tokens" if given[0] == "tokens" else given[0].replace("_", "-")
        raise CommandError(f"--{option}: only for a folder as --output, got the file {target}")
    return encode_to_file(arguments)


class _Report:
    """Prints what a job says of its items and its progress."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        self._line = None if quiet else ProgressLine()
        self._verbose = verbose
        self._errors = 0
        self.last: Progress | None = None

    def progress(self, progress: Progress) -> None:
        """Show a job's progress."""
        self.last = progress
        if self._line is not None:
            self._line(progress)

    def item(self, item: ItemReport) -> None:
        """Name an image that failed, or with `--verbose` any."""
        if item.error is not None:
            self._errors += 1
            if self._verbose or self._errors <= MAX_ERROR_LINES:
                self._print(f"qwenvit: error: {printable(item.id)}: {printable(item.error)}", sys.stderr)
            elif self._errors == MAX_ERROR_LINES + 1:
                self._print(f"qwenvit: further errors only in {ERRORS_NAME}", sys.stderr)
        elif self._verbose:
            grid = "x".join(map(str, item.grid if item.grid[0] > 1 else item.grid[1:]))
            self._print(f"{printable(item.id)}: {grid}, {item.tokens} tokens", sys.stdout)

    def _print(self, text: str, stream: Any) -> None:
        self.end()
        say(text, stream)

    def end(self) -> None:
        """Remove the line of progress."""
        if self._line is not None:
            self._line.clear()


def _encode_to_folder(arguments: argparse.Namespace) -> int:
    if arguments.device is not None and arguments.devices is not None:
        raise CommandError("--device, --devices: expected one of them, got both")
    report = _Report(arguments.quiet, arguments.verbose)
    try:
        manifest = encode_dataset(
            arguments.inputs,
            arguments.output,
            model=arguments.model,
            dtype=arguments.dtype,
            impl=arguments.impl,
            num_workers=arguments.workers,
            decode=arguments.decode,
            video=arguments.video,
            verify=arguments.verify,
            image_column=arguments.image_column,
            overwrite=arguments.overwrite,
            progress=report.progress,
            on_item=report.item,
            **_job_options(arguments),
            **_image_options(arguments),
            **hub_options(arguments),
            **checkpoint_options(arguments),
        )
    except Interrupted as stop:
        report.end()
        if stop.manifest is not None:
            _summarise(stop.manifest, report.last)
        raise
    finally:
        report.end()
    _summarise(manifest, report.last)
    return 1 if manifest.counts["failed"] else 0


def _job_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(arguments, name) for name in JOB_OPTIONS}
    options["devices"] = arguments.devices if arguments.devices is not None else arguments.device
    return options


def _image_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = pixel_bounds(arguments) | {"resize": arguments.resize}
    return {name: value for name, value in options.items() if value is not None}


def _summarise(manifest: Manifest, last: Progress | None) -> None:
    counts = manifest.counts
    inputs = counts["images"] + counts["failed"]
    if last is not None and last.expected is not None and not manifest.complete:
        inputs = max(inputs, last.expected)
    summary = f"{counts['images']:,} of {inputs:,} images -> {printable(str(manifest.folder))}"
    if last is not None:
        done = last.encoded + last.failed
        rate = f", {done / last.seconds:,.3g} images/s" if last.seconds and done else ""
        summary += f" ({last.skipped:,} were done before; {last.encoded:,} in {duration(last.seconds)}{rate})"
    if counts["failed"]:
        summary += f"; {counts['failed']:,} failed: {printable(str(manifest.folder / ERRORS_NAME))}"
    say(summary)
