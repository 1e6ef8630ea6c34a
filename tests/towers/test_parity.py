"""The parity gate: its measures, its verdict, and `scripts/compare_hf.py`, which applies it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.hf_towers import build_tower
from qwenvit.encoder import Encoder
from qwenvit.parity import Difference, close, exact, no_worse, record, replay
from support.pinned import needs_pinned_transformers
from support.towers import SMALL, ours_from

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_hf.py"


def test_difference_by_hand():
    d = Difference.of(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
    assert (d.max_abs, d.mean_abs, d.relative_l2) == (1.0, 0.5, 0.2)
    assert d.cosine == pytest.approx(29 / (34**0.5 * 5))
    with pytest.raises(ValueError, match=r"expected shape \[1\], got \[2\]"):
        Difference.of(torch.zeros(2), torch.zeros(1))


def test_nan_passes_no_check():
    good = torch.ones(3)
    bad = torch.tensor([1.0, float("nan"), 1.0])
    assert not exact("x", bad, good).passed
    assert not close("x", bad, good).passed
    assert not no_worse("x", bad, good * 1.01, good).passed


def test_bounds():
    truth = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert exact("x", truth, truth.clone()).passed
    assert not exact("x", truth, truth.nextafter(truth + 1)).passed
    assert close("x", truth * (1 + 9e-6), truth).passed
    assert not close("x", truth * (1 + 2e-5), truth).passed
    assert no_worse("x", truth * 1.0102, truth * 1.01, truth).passed
    assert not no_worse("x", truth * 1.011, truth * 1.01, truth).passed
    assert no_worse("x", truth, truth, truth).passed
    assert not no_worse("x", truth * 1.01, truth, truth).passed


def test_exact_compares_like_with_like():
    with pytest.raises(ValueError, match=r"expected dtype torch\.float32, got torch\.bfloat16"):
        exact("x", torch.ones(3, dtype=torch.bfloat16), torch.ones(3))


def test_record_and_replay():
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    x = torch.randn(2, 4)
    out, calls = record(blocks, lambda: blocks[1](blocks[0](x)))
    assert torch.equal(calls[1].x, calls[0].out)
    assert torch.equal(calls[1].out, out)
    assert torch.equal(replay(blocks[1], calls[1], calls[1].x.double()), out)
    assert not blocks[0]._forward_hooks


def compare(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent.parent), "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture
def checkpoint(tmp_path):
    config = SMALL["qwen2_5_vl"]
    Encoder(ours_from(build_tower(config), config)).save_pretrained(tmp_path)
    return tmp_path


@needs_pinned_transformers
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_compare_hf_passes_the_tower(checkpoint, dtype):
    done = compare("--model", checkpoint, "--dtype", dtype, "--device", "cpu", "--max-pixels", 40000, "--rounds", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("PASS")
    assert "max_abs: 33 checks, worst 0, bound 0" in done.stdout
    assert "ratio" in done.stdout


@needs_pinned_transformers
def test_compare_hf_feeds_one_image_and_a_video(checkpoint):
    kinds = ("image", "video")
    done = compare("--model", checkpoint, "--device", "cpu", "--max-pixels", 40000, "--rounds", 0, "--input", *kinds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "patches of synthetic 448x448\n" in done.stdout
    assert "patches of synthetic video\n" in done.stdout
    assert "max_abs: 66 checks, worst 0, bound 0" in done.stdout


@needs_pinned_transformers
def test_compare_hf_fails_weights_that_only_one_side_reads(checkpoint):
    """The script must be able to fail: here a stray file, read by one tower only, changes its weights."""
    weights = load_file(checkpoint / "model.safetensors")
    save_file({"blocks.3.mlp.up_proj.bias": weights["blocks.3.mlp.up_proj.bias"] * 1.5}, checkpoint / "zz.safetensors")
    done = compare("--model", checkpoint, "--device", "cpu", "--max-pixels", 40000, "--rounds", 0)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL block 3" in done.stdout
    assert done.stdout.rstrip().endswith("FAIL")


def test_compare_hf_usage():
    assert compare("--random", "gpt-9").returncode == 2
