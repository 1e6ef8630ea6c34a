"""The `qwenvit` command: its arguments and how it fails."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError

from qwenvit import __version__
from qwenvit.arguments import DTYPES
from qwenvit.cli import commands
from qwenvit.cli.commands import CommandError, one_line
from qwenvit.default_encoder import DEFAULT_MODEL

MODEL_HELP = (
    "directory or .safetensors file, Hub repository (Qwen/Qwen2.5-VL-7B-Instruct), published short name "
    "(qwen2_5_vl-7b), or 'demo' for the embedded tower of random weights"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 wrong usage)."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():  # puts everything back at the end
            warnings.showwarning = lambda message, *_, **__: print(f"qwenvit: warning: {message}", file=sys.stderr)
            return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("qwenvit: interrupted", file=sys.stderr)
        return 130
    except (CommandError, ArithmeticError, OSError, TypeError, ValueError, HfHubHTTPError) as error:
        print(f"qwenvit: error: {one_line(error)}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"qwenvit: error: {one_line(error).split('. ')[0]}; try --max-pixels or --dtype", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwenvit",
        description="The vision tower of Qwen-VL models, alone.",
        epilog="Try it without a download: qwenvit encode PICTURE.png --model demo",
    )
    parser.add_argument("--version", action="version", version=f"qwenvit {__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")

    hub = argparse.ArgumentParser(add_help=False)
    hub.add_argument("--revision", help="Hub branch, tag or commit")
    hub.add_argument("--local-files-only", action="store_true", help="never use the network")
    hub.add_argument(
        "--force-download", action="store_true", help="ask the Hub for the branch's current commit, not the kept one"
    )
    tower = argparse.ArgumentParser(add_help=False, parents=[hub])
    tower.add_argument("--device", help="default: the GPU where there is one, else the CPU")
    tower.add_argument("--dtype", choices=[*DTYPES, "auto"], help="default: bfloat16 on a GPU, float32 on the CPU")
    tower.add_argument("--impl", choices=["auto", "triton", "reference"], default="auto", help="default: %(default)s")
    pixels = argparse.ArgumentParser(add_help=False)
    pixels.add_argument("--min-pixels", type=int, help="smaller images are enlarged to this area")
    pixels.add_argument("--max-pixels", type=int, help="larger images are shrunk to this area")

    command = subcommands.add_parser(
        "encode",
        parents=[tower, pixels],
        help="images in, embeddings out",
        description="Embed image files. Prints each image's grid of tokens (rows x columns), their number, the time "
        "and the mean norm of its tokens.",
        epilog="The .safetensors file holds NAME/tokens and NAME/deepstack.K for every image, and the grids in its "
        "metadata. Give a folder as output to write one file per image instead.",
    )
    command.add_argument("inputs", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="folders are searched whole")
    target = Path("embeddings.safetensors")
    command.add_argument("-o", "--output", type=Path, default=target, help="file or folder (default: %(default)s)")
    command.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")
    command.set_defaults(run=commands.encode)

    command = subcommands.add_parser(
        "info",
        parents=[tower],
        help="config, parameters, tokens and GFLOPs",
        description="Describe a tower. Needs no weights, and no network for a published model. Without MODEL, lists "
        "the published towers.",
    )
    command.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "--size", type=_size, nargs="+", default=[(448, 448), (1344, 1344)], metavar="HxW", help="image sizes in pixels"
    )
    command.add_argument("--load", action="store_true", help="load the weights too and print how long it took")
    command.set_defaults(run=commands.info)

    command = subcommands.add_parser(
        "fetch",
        parents=[hub],
        help="a model's tower alone, to a folder",
        description="Download only the vision tensors of a checkpoint (or take them from a directory) and write them "
        "with their configs to a folder that qwenvit and transformers load.",
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("output", type=Path, metavar="FOLDER")
    command.set_defaults(run=commands.fetch)

    command = subcommands.add_parser(
        "picture",
        parents=[tower, pixels],
        help="a PCA map of an image's features",
        description="Draw an image beside the first three principal components of its patch features.",
    )
    command.add_argument("image", type=Path)
    command.add_argument("-o", "--output", type=Path, default=Path("features.png"), help="default: %(default)s")
    command.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")
    command.add_argument("--map-only", action="store_true", help="the map without the image beside it")
    command.set_defaults(run=commands.picture)
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, got {text!r}") from None
