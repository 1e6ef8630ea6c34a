"""The `qwenvit` command."""

from qwenvit.cli.parser import main

__all__ = ["main"]
