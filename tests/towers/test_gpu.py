"""Both towers on a GPU, whose kernels differ: the bounds of `qwenvit.parity` apply instead of equality."""

import pytest
import torch

from common.hf_towers import build_tower
from qwenvit.encoder import Encoder
from qwenvit.parity import blocks_no_worse, close, record
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.fast import FastTower
from support.towers import FULL, MIXED_GRIDS, SMALL, narrow, ours_from, random_pixels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _ieee_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def run(tower, pixels, plan, hf=False):
    with torch.no_grad():
        return tower(pixels, grid_thw=plan.grid_thw.cuda()) if hf else tower(pixels, plan)


@pytest.mark.parametrize("family", SMALL)
def test_fp32_agrees_with_transformers_and_with_the_cpu(family):
    config = SMALL[family]
    hf = build_tower(config)
    ours = ours_from(hf, config)
    plan = GridPlan.build(MIXED_GRIDS, config)
    pixels = random_pixels(plan.num_patches, config)
    on_cpu = run(ours, pixels, plan).pooler_output
    plan = GridPlan.build(MIXED_GRIDS, config, "cuda")
    on_gpu = run(ours.cuda(), pixels.cuda(), plan).pooler_output
    theirs = run(hf.cuda(), pixels.cuda(), plan, hf=True).pooler_output
    for check in (close("transformers", on_gpu, theirs), close("CPU", on_gpu.cpu(), on_cpu)):
        assert check.passed, check


def fast_from(hf, config):
    tower = FastTower(config).to("cuda", next(hf.parameters()).dtype)
    tower.load_state_dict(ours_from(hf, config).state_dict())
    return tower


@pytest.mark.parametrize("family", FULL)
def test_the_fast_tower_agrees_with_transformers_in_fp32(family):
    config = narrow(family)
    hf = build_tower(config, device="cuda")
    plan = GridPlan.build(MIXED_GRIDS, config, "cuda")
    pixels = random_pixels(plan.num_patches, config).cuda()
    ours = run(fast_from(hf, config), pixels, plan)
    theirs = run(hf, pixels, plan, hf=True)
    check = close("tokens", ours.pooler_output, theirs.pooler_output)
    assert check.passed, check


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("fast", [False, True], ids=["reference", "fast"])
def test_block_errors_are_within_the_baseline_error(fast, family, dtype):
    config = narrow(family) if fast else SMALL[family]
    truth = build_tower(config, device="cuda")
    theirs = build_tower(config, dtype=dtype, device="cuda")
    ours = (fast_from if fast else ours_from)(theirs, config)
    plan = GridPlan.build(MIXED_GRIDS, config, "cuda")
    pixels = random_pixels(plan.num_patches, config).cuda()
    _, true_calls = record(truth.blocks, lambda: run(truth, pixels, plan, hf=True))
    _, their_calls = record(theirs.blocks, lambda: run(theirs, pixels, plan, hf=True))
    _, our_calls = record(ours.blocks, lambda: run(ours, pixels, plan))
    for check in blocks_no_worse((ours.blocks, our_calls), (theirs.blocks, their_calls), true_calls):
        assert check.passed, check


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_defaults_are_the_gpu_and_bfloat16():
    enc = Encoder.from_pretrained("demo")
    assert (enc.device.type, enc.dtype) == ("cuda", torch.bfloat16)
    out = enc.encode(torch.zeros(64, 64, 3, dtype=torch.uint8))
    assert out.packed.is_cuda
    assert not out.grid_thw.is_cuda
