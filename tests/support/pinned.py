"""Tests that need the version of transformers they compare with: the one in constraints.txt."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text()
PINNED = re.search(r"^transformers==(\d+\.\d+)\.", CONSTRAINTS, re.MULTILINE)[1]
INSTALLED = version("transformers")

needs_pinned_transformers = pytest.mark.skipif(
    not INSTALLED.startswith(f"{PINNED}."),
    reason=f"needs transformers {PINNED}, whose results differ from those of {INSTALLED} here",
)
