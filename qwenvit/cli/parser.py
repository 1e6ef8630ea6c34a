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

OVERWRITE_HELP = (
    "start anew where the folder's rows have other settings; replace a file, even one with more images. Rows of the "
    "same settings stay: to encode an image again, remove its shard"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 (success), 1 (failure) or 128 + the signal. Wrong usage exits with 2."""
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
        description="Embed image files, folders, tar archives, parquet files and videos. A folder as output gets "
        "numbered shards, a manifest and errors.jsonl; the same command continues after any interruption. A file gets "
        "the embeddings of a few images, and the command prints each image's grid of tokens (rows x columns), their "
        "number, the time and the mean norm of its tokens.",
        epilog="Exit codes: 0, all images are encoded; 1, some failed, or an error; 130, 143 and 129, stopped by "
        "SIGINT, SIGTERM and SIGHUP with what was encoded kept. qwenvit/datasets/README.md describes the output; "
        "qwenvit.load_embeddings reads .safetensors files.",
    )
    command.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images; folders, searched recursively; quoted patterns ('2024/**/*.jpg'); .tar; .parquet; - for a list "
        "of paths on standard input, one a line or separated by null bytes",
    )
    target = Path("embeddings.safetensors")
    command.add_argument(
        "-o", "--output", type=Path, default=target, help="a folder, or a file *.safetensors (default: %(default)s)"
    )
    command.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")
    command.add_argument("--resize", choices=["torch", "pillow"], help="whose arithmetic; default: the checkpoint's")
    command.add_argument("--decode", choices=["pillow", "nvjpeg"], default="pillow", help="default: %(default)s")
    command.add_argument("--workers", type=int, metavar="N", help="threads that decode, for each device (default: 4)")
    command.add_argument("--video", action="store_true", help="also take video files (needs PyAV)")
    command.add_argument("--image-column", metavar="NAME", help="the column of parquet files; needed for one of paths")
    command.add_argument("--verify", action="store_true", help="tell changed inputs by hash, not by size and time")
    command.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    talk = command.add_mutually_exclusive_group()
    talk.add_argument("-q", "--quiet", action="store_true", help="print only errors and the summary")
    talk.add_argument("-v", "--verbose", action="store_true", help="print a line for every image and every error")
    shards = command.add_argument_group("with a folder as output")
    shards.add_argument("--format", choices=["safetensors", "parquet", "npy"], default="safetensors")
    shards.add_argument(
        "--pool",
        choices=["none", "mean", "patches"],
        help="one vector an image: the mean of its tokens, or of its patches after the last block",
    )
    shards.add_argument("--normalize", action="store_true", help="divide vectors by their length")
    shards.add_argument("--no-tokens", dest="tokens", action="store_false", help="write vectors only")
    shards.add_argument("--shard-images", type=int, default=10_000, metavar="N", help="default: %(default)s")
    shards.add_argument(
        "--shard-bytes", type=_bytes, default=2**30, metavar="SIZE", help="such as 512M or 4G (default: 1G)"
    )
    shards.add_argument("--devices", metavar="LIST", help="a process for each: 0,1 or cuda:0,cuda:1 or all")

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
        help="maps of images' features, layer by layer",
        description="Draw images and the first three principal components of their features in red, green and blue: a "
        "row an image, a column a layer. All images of a column share one PCA, so that equal colours mean similar "
        "features. With --query, draw how similar each cell is to one cell of the first image instead. Prints each "
        "image's grid (rows x columns).",
    )
    command.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="images; folders, searched recursively; quoted patterns ('2024/**/*.jpg'); .tar; .parquet",
    )
    command.add_argument("-o", "--output", type=Path, default=Path("features.png"), help="default: %(default)s")
    command.add_argument("-m", "--model", default=DEFAULT_MODEL, help=f"{MODEL_HELP} (default: %(default)s)")
    command.add_argument(
        "--layers",
        type=_integers,
        default=(-1,),
        metavar="K,…",
        help="layers as transformers' hidden_states count them: 0 is the first block's input, k the output of the k-th "
        "block, -1 the last (default: -1). Write --layers=-2,-1 where the first is negative",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--query", type=_pair, metavar="ROW,COLUMN", help="compare with this cell of the first image's map, from 0,0"
    )
    where.add_argument(
        "--query-pixel", type=_pair, metavar="X,Y", help="compare with the cell of this pixel of the first image"
    )
    command.add_argument(
        "--what",
        choices=["patches", "tokens"],
        default="patches",
        help="what a cell is: a patch, or the mean of the patches of a merged token (default: %(default)s)",
    )
    command.add_argument("--norm", action="store_true", help="apply the final merger's norm to each patch first")
    command.add_argument("--map-only", action="store_true", help="only the maps, without images and captions")
    command.add_argument(
        "--side", type=int, default=448, metavar="PIXELS", help="longer side of each picture (default: %(default)s)"
    )
    command.add_argument(
        "--limit", type=int, default=24, metavar="N", help="draw at most N images (default: %(default)s)"
    )
    return parser


def _bytes(text: str) -> int:
    units = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    number = text.upper().removesuffix("B").removesuffix("I").rstrip("KMGT")
    unit = text.upper().removesuffix("B").removesuffix("I")[len(number) :]
    try:
        return int(float(number) * 2 ** units[unit])
    except (KeyError, OverflowError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 4G, got {text!r}") from None


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 8,16,-1, got {text!r}") from None


def _pair(text: str) -> tuple[int, int]:
    pair = _integers(text)
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"expected two integers such as 12,20, got {text!r}")
    return pair[0], pair[1]


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, got {text!r}") from None
