"""The `qwenvit` command: its arguments."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qwenvit import __version__
from qwenvit.arguments import DTYPE_NAMES
from qwenvit.config.families import FAMILIES
from qwenvit.config.published import DEFAULT_MODEL

MODEL_HELP = (
    "directory or .safetensors file, Hub repository (Qwen/Qwen2.5-VL-7B-Instruct), published short name "
    "(qwen2_5_vl-7b), or 'demo' for the embedded tower of random weights"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 (success), 1 (failure) or 130 (interrupted). Wrong usage exits with 2."""
    arguments = _parser().parse_args(argv)
    from qwenvit.cli.commands import run  # not at the top: torch takes seconds to import, and --help needs none of it

    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwenvit",
        description="The vision tower of Qwen-VL models, alone.",
        epilog="Try it without a download: qwenvit encode PICTURE.png --model demo",
    )
    parser.add_argument("--version", action="version", version=f"qwenvit {__version__}")
    subcommands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    loading = argparse.ArgumentParser(add_help=False)
    loading.add_argument("--revision", help="Hub branch, tag or commit")
    loading.add_argument("--local-files-only", action="store_true", help="never use the network")
    loading.add_argument("--force-download", action="store_true", help="ask the Hub for the branch's current commit")
    loading.add_argument("--subfolder", metavar="FOLDER", help="the folder inside the model's that has the checkpoint")
    loading.add_argument("--config", metavar="FILE", help="a config.json to use instead of the checkpoint's")
    loading.add_argument("--family", choices=list(FAMILIES), help="default: what config.json or the tensors' names say")
    loading.add_argument("--prefix", help="what the tower's tensors start with, where a checkpoint has several towers")
    adapter = loading.add_mutually_exclusive_group()
    adapter.add_argument(
        "--adapter", help="LoRA adapter to merge: folder, file or Hub repository (default: the one beside the model)"
    )
    adapter.add_argument("--no-adapter", dest="adapter", action="store_false", default=None, help="merge none")
    tower = argparse.ArgumentParser(add_help=False, parents=[loading])
    tower.add_argument("--device", help="default: the GPU where there is one, else the CPU")
    tower.add_argument("--dtype", choices=[*DTYPE_NAMES, "auto"], help="default: bfloat16 on a GPU, float32 on the CPU")
    tower.add_argument("--impl", choices=["auto", "triton", "reference"], default="auto", help="default: %(default)s")
    pixels = argparse.ArgumentParser(add_help=False)
    pixels.add_argument("--min-pixels", type=int, help="smaller images are enlarged to this area")
    pixels.add_argument("--max-pixels", type=int, help="larger images are shrunk to this area")
    pixels.add_argument("--max-tokens", type=int, help="instead of --max-pixels: the most tokens of an image")

    command = subcommands.add_parser(
        "encode",
        parents=[tower, pixels],
        help="images in, embeddings out",
        description="Embed image files. Prints each image's grid of tokens (rows x columns), their number, the time "
        "and the mean norm of its tokens.",
        epilog="The .safetensors file has NAME/tokens and NAME/deepstack.K for every image, and the grids and the "
        "tower's config in its metadata. With a folder as output, every image gets a file of its own. "
        "qwenvit.load_embeddings reads both.",
    )
    command.add_argument(
        "inputs", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="folders are searched recursively"
    )
    target = Path("embeddings.safetensors")
    command.add_argument("-o", "--output", type=Path, default=target, help="file or folder (default: %(default)s)")
    command.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")

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
    command.add_argument("--load", action="store_true", help="also load the weights and print the time it took")

    command = subcommands.add_parser(
        "fetch",
        parents=[loading],
        help="write a model's tower to a folder",
        description="Download only the vision tensors of a checkpoint (or read them from a directory) and write them "
        "with their configs to a folder that qwenvit and transformers load.",
    )
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument("output", type=Path, metavar="FOLDER")

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
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, got {text!r}") from None
