"""What the documents say of the plugin for vLLM is what its code does."""

from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import get_args

import pytest

from qwenvit.integrations.vllm.architectures import ARCHITECTURES, VERSIONS
from qwenvit.integrations.vllm.mode import Choice, Mode
from qwenvit.integrations.vllm.options import Options, PluginImpl, Wish

ROOT = Path(__file__).parents[3]
README = (ROOT / "qwenvit/integrations/README.md").read_text()
VLLM = README[README.index("# In vLLM") : README.index("# In SGLang")]


def rows(heading):
    """Return the rows of the table below a heading, as lists of cells."""
    lines = VLLM[VLLM.index(heading) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|---"))
    table = takewhile(lambda line: line.startswith("|"), lines[start + 1 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_options():
    table = {name.strip("`"): values for name, values in rows("## Options")}
    assert list(table) == [field.name for field in fields(Options)]
    for name, values in {"tower": get_args(Wish), "impl": get_args(PluginImpl), "pixels": ("true", "false")}.items():
        for value in values:
            assert value in table[name], (name, value)


def test_modes():
    assert [mode for mode, *_ in rows("## What it replaces")] == list(get_args(Mode))


def test_the_log_line():
    choice = Choice("tower", impl="triton", make_tower=lambda: None)
    assert f"\nqwenvit: {choice}; torch.bfloat16 on cuda:0; images travel as RGB bytes\n" in VLLM


@pytest.mark.parametrize("document", ["qwenvit/integrations/README.md", "README.md", "CHANGELOG.md"])
def test_versions(document):
    oldest, newest = (".".join(map(str, version)) for version in VERSIONS)
    assert f"{oldest} to {newest}" in (ROOT / document).read_text()


def test_architectures():
    """The table names the families; the code has their mixtures of experts and Omni models too."""
    (families, *_) = rows("## Versions")
    named = families[1].replace("-", "").replace(".", "_")
    for architecture in ARCHITECTURES:
        family = architecture.partition("For")[0].removesuffix("Model").removesuffix("Moe").replace("_VL", "VL")
        assert family in named, family
