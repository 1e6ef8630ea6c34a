"""The subcommands of `qwenvit`: each takes the parsed arguments and returns the exit code."""

import argparse
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError

from qwenvit.cli.encode import encode
from qwenvit.cli.loading import CommandError, checkpoint_options, hub_options, load
from qwenvit.cli.picture import picture
from qwenvit.cli.terminal import make_lenient, one_line, printable, say, silence
from qwenvit.config.published import PUBLISHED, published_config
from qwenvit.config.vision_config import VisionConfig
from qwenvit.datasets.signals import Interrupted
from qwenvit.encoder import Encoder
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.preprocess.from_checkpoint import read_processors
from qwenvit.preprocess.image_processor import ImageProcessor
from qwenvit.towers import demo
from qwenvit.towers.checkpoint import read_config
from qwenvit.towers.cost import flops, parameters
from qwenvit.towers.locate import directory_of, locate
from qwenvit.towers.pretrained import refuse_for_demo

BROKEN_PIPE = 141
"""The exit code of a program that SIGPIPE has ended, as a shell reports it."""


def run(arguments: argparse.Namespace) -> int:
    """Run the parsed subcommand and return its exit code; print warnings and a failure as one line each."""
    commands = {"encode": encode, "info": info, "fetch": fetch, "picture": picture}
    make_lenient(sys.stdout)
    make_lenient(sys.stderr)
    try:
        with warnings.catch_warnings():  # restores showwarning
            warnings.showwarning = _show_warning
            return commands[arguments.command](arguments)
    except Interrupted as stop:
        more = "" if stop.manifest is None else "; what was encoded is kept, and the same command continues"
        say(f"qwenvit: {stop}{more}", sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        say("qwenvit: interrupted", sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        silence(sys.stdout)
        return BROKEN_PIPE
    except (CommandError, ArithmeticError, ImportError, OSError, TypeError, ValueError, HfHubHTTPError) as error:
        say(f"qwenvit: error: {one_line(error)}", sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        say(f"qwenvit: error: {one_line(error).split('. ')[0]}; try --max-pixels or --dtype", sys.stderr)
        return 1


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"qwenvit: warning: {printable(str(message))}", sys.stderr)


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
        encoder = load(arguments)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{'loaded':<26} {time.perf_counter() - start:.2f} s, {encoder.dtype}, {encoder.device}")
    return 0


def fetch(arguments: argparse.Namespace) -> int:
    """Write a model's vision tower and its configs to a folder."""
    encoder = Encoder.from_pretrained(
        arguments.model, device="cpu", dtype="auto", **hub_options(arguments), **checkpoint_options(arguments)
    )
    encoder.save_pretrained(arguments.output)
    print(f"{arguments.model}: {parameters(encoder.config) / 1e6:.1f} M parameters -> {arguments.output}")
    return 0


def _config_and_processor(arguments: argparse.Namespace) -> tuple[VisionConfig, ImageProcessor]:
    """Return a model's config and image processor without loading its weights."""
    if arguments.model == demo.NAME:
        refuse_for_demo({"subfolder": arguments.subfolder} | checkpoint_options(arguments))
        return demo.CONFIG, ImageProcessor.for_family(demo.CONFIG.family)
    given = {"config": arguments.config, "family": arguments.family}
    published = arguments.subfolder is None and not any(given.values())
    if published and not Path(arguments.model).expanduser().exists():
        with suppress(ValueError):
            config = published_config(arguments.model)
            return config, ImageProcessor.for_family(config.family)
    source = locate(arguments.model, config_only=True, **hub_options(arguments))
    config = read_config(source, prefix=arguments.prefix, **given)
    return config, read_processors(directory_of(source), config.family)[0]
