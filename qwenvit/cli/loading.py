"""Parsed arguments → the keyword arguments of the library, and a loaded encoder."""

import argparse
from typing import Any

from qwenvit.encoder import Encoder


class CommandError(Exception):
    """A failure of the command line; its text is the message to print."""


def load(arguments: argparse.Namespace) -> Encoder:
    """Load the encoder that the arguments describe."""
    return Encoder.from_pretrained(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        impl=arguments.impl,
        **hub_options(arguments),
        **checkpoint_options(arguments),
    )


def hub_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return where a checkpoint comes from."""
    keys = ("subfolder", "revision", "local_files_only", "force_download")
    return {key: getattr(arguments, key) for key in keys}


def checkpoint_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a checkpoint does not say itself."""
    return {key: getattr(arguments, key) for key in ("config", "family", "prefix", "adapter")}


def pixel_bounds(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the bounds of each image's area."""
    return {key: getattr(arguments, key) for key in ("min_pixels", "max_pixels", "max_tokens")}
