"""The subcommands of `qwenvit`: each takes the parsed arguments and returns the exit code."""

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import tqdm
from PIL import Image

from qwenvit.cli.feature_map import patch_features, pca_picture, side_by_side
from qwenvit.config.published import PUBLISHED, published_config
from qwenvit.config.vision_config import VisionConfig
from qwenvit.embedding_file import save_embeddings
from qwenvit.encoder import Encoder
from qwenvit.outputs import ItemEmbeddings
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.preprocess.decode import open_image
from qwenvit.preprocess.from_checkpoint import read_processors
from qwenvit.preprocess.image_file import SUFFIXES
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.towers import demo
from qwenvit.towers.checkpoint import read_config
from qwenvit.towers.cost import flops, parameters
from qwenvit.towers.locate import directory_of, locate
from qwenvit.towers.pretrained import refuse_for_demo


class CommandError(Exception):
    """A failure of the command line; its text is the message to print."""


def run(arguments: argparse.Namespace) -> int:
    """Run the parsed subcommand and return its exit code; print warnings and a failure as one line each."""
    commands = {"encode": encode, "info": info, "fetch": fetch, "picture": picture}
    try:
        with warnings.catch_warnings():  # restores showwarning
            warnings.showwarning = lambda message, *_, **__: print(f"qwenvit: warning: {message}", file=sys.stderr)
            return commands[arguments.command](arguments)
    except KeyboardInterrupt:
        print("qwenvit: interrupted", file=sys.stderr)
        return 130
    except (CommandError, ArithmeticError, OSError, TypeError, ValueError, HfHubHTTPError) as error:
        print(f"qwenvit: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"qwenvit: error: {_one_line(error).split('. ')[0]}; try --max-pixels or --dtype", file=sys.stderr)
        return 1


def encode(arguments: argparse.Namespace) -> int:
    """Embed files and folders; name and skip broken files, which make the exit code 1."""
    files = _image_files(arguments.inputs)
    to_folder = _prepare_output(arguments.output)
    encoder = _load(arguments)
    encoder.image_processor.with_bounds(**_pixel_bounds(arguments))  # fail on impossible bounds here, not at every file
    items: dict[str, ItemEmbeddings] = {}
    encoded = 0
    print(f"{'image':<32} {'grid':>9} {'tokens':>7} {'ms':>9} {'norm':>9}")
    try:
        for path, name in tqdm(files, unit="image", disable=None):
            try:
                start = time.perf_counter()
                item = encoder.encode(path, **_pixel_bounds(arguments))[0]
                norm = float(item.tokens.float().norm(dim=1).mean())  # float() waits for the GPU
                milliseconds = (time.perf_counter() - start) * 1e3
            except (ArithmeticError, MemoryError, OSError, TypeError, ValueError, torch.OutOfMemoryError) as error:
                tqdm.write(f"qwenvit: error: {path}: {_one_line(error)}", file=sys.stderr)
                continue
            grid = f"{item.grid[1]}x{item.grid[2]}"
            tqdm.write(f"{name[-32:]:<32} {grid:>9} {len(item.tokens):>7} {milliseconds:>9.1f} {norm:>9.2f}")
            if to_folder:
                target = arguments.output / f"{name}.safetensors"
                target.parent.mkdir(parents=True, exist_ok=True)
                save_embeddings(target, {name: item}, arguments.model, prefixed=False)
            else:
                items[name] = item.cpu()
            encoded += 1
    finally:  # an interrupted run keeps what it has encoded
        if items:
            save_embeddings(arguments.output, items, arguments.model)
        print(f"{encoded} of {len(files)} images -> {arguments.output if encoded else 'nothing written'}")
    return 0 if encoded == len(files) else 1


def info(arguments: argparse.Namespace) -> int:
    """Describe a tower, or list the published ones."""
    if arguments.model is None:
        if arguments.load:
            raise CommandError("--load needs a MODEL")
        print(f"{'name':<20} {'repository':<34} {'depth':>5} {'width':>6} {'heads':>6} {'out':>6} {'parameters':>11}")
        for name, published in PUBLISHED.items():
            config = published.config
            size = f"{parameters(config) / 1e6:.1f} M"
            print(
                f"{name:<20} {published.repo_id:<34} {config.depth:>5} {config.hidden_size:>6} {config.num_heads:>6} "
                f"{config.out_hidden_size:>6} {size:>11}"
            )
        return 0
    config, processor = _config_and_processor(arguments)
    for key, value in config.to_hf().items():
        print(f"{key:<26} {value}")
    print(f"{'parameters':<26} {parameters(config) / 1e6:.1f} M")
    for height, width in arguments.size:
        plan = GridPlan.build([processor.grid_for(height, width)], config)
        tokens = plan.num_patches // config.merge_unit
        print(
            f"{f'{height}x{width} image':<26} {plan.num_patches} patches, {tokens} tokens, "
            f"{flops(config, plan) / 1e9:.1f} GFLOP"
        )
    if arguments.load:
        start = time.perf_counter()
        encoder = _load(arguments)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{'loaded':<26} {time.perf_counter() - start:.2f} s, {encoder.dtype}, {encoder.device}")
    return 0


def fetch(arguments: argparse.Namespace) -> int:
    """Write a model's vision tower and its configs to a folder."""
    encoder = Encoder.from_pretrained(
        arguments.model, device="cpu", dtype="auto", **_hub_options(arguments), **_checkpoint_options(arguments)
    )
    encoder.save_pretrained(arguments.output)
    print(f"{arguments.model}: {parameters(encoder.config) / 1e6:.1f} M parameters -> {arguments.output}")
    return 0


def picture(arguments: argparse.Namespace) -> int:
    """Draw the principal components of an image's patch features."""
    encoder = _load(arguments)
    features = patch_features(encoder, arguments.image, **_pixel_bounds(arguments))
    image = Image.fromarray(open_image(arguments.image).permute(1, 2, 0).contiguous().numpy())
    feature_picture = pca_picture(features, image.size)
    output = feature_picture if arguments.map_only else side_by_side(image, feature_picture)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    output.save(arguments.output)
    print(f"{features.shape[0]}x{features.shape[1]} patches -> {arguments.output}")
    return 0


def _load(arguments: argparse.Namespace) -> Encoder:
    return Encoder.from_pretrained(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        impl=arguments.impl,
        **_hub_options(arguments),
        **_checkpoint_options(arguments),
    )


def _hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = ("subfolder", "revision", "local_files_only", "force_download")
    return {key: getattr(arguments, key) for key in keys}


def _checkpoint_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(arguments, key) for key in ("config", "family", "prefix", "adapter")}


def _pixel_bounds(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(arguments, key) for key in ("min_pixels", "max_pixels", "max_tokens")}


def _config_and_processor(arguments: argparse.Namespace) -> tuple[VisionConfig, ImageProcessor]:
    """Return a model's config and image processor without loading its weights."""
    if arguments.model == demo.NAME:
        refuse_for_demo({"subfolder": arguments.subfolder} | _checkpoint_options(arguments))
        return demo.CONFIG, ImageProcessor.for_family(demo.CONFIG.family)
    given = {"config": arguments.config, "family": arguments.family}
    published = arguments.subfolder is None and not any(given.values())
    if published and not Path(arguments.model).expanduser().exists():
        with suppress(ValueError):
            config = published_config(arguments.model)
            return config, ImageProcessor.for_family(config.family)
    source = locate(arguments.model, config_only=True, **_hub_options(arguments))
    config = read_config(source, prefix=arguments.prefix, **given)
    return config, read_processors(directory_of(source), config.family)[0]


def _image_files(inputs: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return each image file and the name it gets in the output: its path relative to the input folder, or its name."""
    files: list[tuple[Path, str]] = []
    for path in inputs:
        if path.is_dir():
            # macOS writes metadata files such as `._photo.jpg` on disks of other file systems.
            all_files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("._"))
            images = [p for p in all_files if p.suffix.lower() in SUFFIXES]
            if not images:
                raise CommandError(f"{path}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
            if others := len(all_files) - len(images):
                print(f"qwenvit: {path}: {others} other files skipped", file=sys.stderr)
            files += [(p, p.relative_to(path).as_posix()) for p in images]
        elif path.is_file():
            files.append((path, path.name))
        else:
            raise CommandError(f"{path}: no such file or folder")
    if repeated := sorted(name for name, count in Counter(name for _, name in files).items() if count > 1):
        raise CommandError(f"inputs of the same name would overwrite each other: {', '.join(repeated)}")
    if unwritable := [name for _, name in files if not _is_unicode(name)]:
        raise CommandError(f"a file name that is not valid Unicode cannot name a tensor: {unwritable[0]!a}")
    return files


def _is_unicode(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _prepare_output(target: Path) -> bool:
    """Create the output folder, or the folder of the output file; return whether the output is a folder."""
    if target.is_dir() or not target.suffix:
        target.mkdir(parents=True, exist_ok=True)
        return True
    if target.suffix != ".safetensors":
        raise CommandError(f"--output: expected a folder or a file called *.safetensors, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return False


def _one_line(error: Exception) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
