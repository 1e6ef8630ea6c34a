"""`alpha_pattern` and `rank_pattern`: what peft reads in them, and no expression that takes for ever."""

import shutil
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from qwenvit.weights.adapters.adapter import read_adapter
from qwenvit.weights.adapters.patterns import compile_patterns, value_for
from support.tiny_adapters import base_model, configure, differing, merged_by_peft, merged_by_us, wrap

FAMILY = "qwen3_vl"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    wrap(base_model(FAMILY), target_modules=["blocks.0.attn.qkv"], r=3).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    """The folder of an adapter, to be changed."""
    return shutil.copytree(saved, tmp_path / "adapter")


PIECES = st.sampled_from(["model", "visual", r"\.", ".", "blocks", "0", "[01]", "(qkv|proj)", ".*", "attn", "^", "$"])
PATHS = ("model.visual.blocks.0.attn.qkv", "model.visual.blocks.11.attn.proj", "blocks.0.norm1", "qkv", "")


@given(keys=st.lists(st.lists(PIECES, min_size=1, max_size=6).map("".join), max_size=3, unique=True))
def test_the_first_that_matches_counts_as_in_peft(keys):
    patterns = {key: number for number, key in enumerate(keys)}
    for path in PATHS:
        theirs = patterns.get(get_pattern_key(patterns, path), "default")
        assert value_for(path, compile_patterns(patterns), "default") == theirs


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(.*.*)*x",
        r"(a|aa)+$",
        r"(?=a)b",
        r"(a)\1",
        r".*.*.*.*.*.*.*x",
        "a?" * 60 + "a" * 60,
        "(a|a)" * 40 + "x",
        "x{1,9}{1,9}{1,9}",
        "(",
        "[",
        "*a",
        "a" * 1001,
    ],
)
def test_one_that_could_take_for_ever_is_refused_at_once(adapter, pattern):
    configure(adapter, alpha_pattern={pattern: 1})
    started = time.monotonic()
    with pytest.raises(ValueError, match="alpha_pattern: expected"):
        read_adapter(adapter)
    assert time.monotonic() - started < 5


def test_too_many_are_refused_at_once(adapter):
    configure(adapter, rank_pattern={f".*layers.{index}.*": 3 for index in range(100_000)})
    with pytest.raises(ValueError, match="rank_pattern: expected patterns that are quick to match, got too many"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "pattern",
    ["qkv", "^model.visual.blocks.0.attn.qkv", r"blocks\.(0|1)\.attn\.(qkv|proj)", r".*visual.*", "q_proj|k_proj",
     r"layers\.(?:1[0-9]|2[0-7])\..*", r"blocks\.\d+\.attn\..+"],
)  # fmt: skip
def test_those_that_people_write_are_understood(adapter, pattern):
    configure(adapter, rank_pattern={pattern: 3}, alpha_pattern={pattern: 7})
    model = base_model(FAMILY)
    assert differing(merged_by_us(read_adapter(adapter), FAMILY, model), merged_by_peft(model, adapter)) == []
