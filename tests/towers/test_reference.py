"""The reference tower against transformers' tower: bitwise equal on the CPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.hf_towers import build_tower, forward
from qwenvit.parity import Difference, record
from qwenvit.plan.grid_plan import GridPlan
from support.towers import FULL, MIXED_GRIDS, SMALL, one_block, ours_from, random_pixels

FAMILIES = list(SMALL)
REPRESENTATIVE = ("qwen2_5_vl", "qwen3_vl")
"""Families whose full-size block runs every time. Narrow towers of full depth cover the structure of the others."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_equal_towers(config, dtype, grids, variant=None):
    hf = build_tower(config, dtype=dtype, variant=variant)
    ours = ours_from(hf, config)
    plan = GridPlan.build(grids, config)
    pixels = random_pixels(plan.num_patches, config)
    with torch.no_grad():
        output, our_calls = record(ours.blocks, lambda: ours(pixels, plan))
    (hidden, tokens, deepstack), their_calls = record(hf.blocks, lambda: forward(hf, pixels, torch.tensor(grids)))
    assert tokens.isfinite().all()
    for block, (our_call, their_call) in enumerate(zip(our_calls, their_calls, strict=True)):
        assert torch.equal(our_call.out, their_call.out), f"block {block}"
    assert torch.equal(output.last_hidden_state, hidden)
    assert torch.equal(output.pooler_output, tokens)
    assert len(output.deepstack_features) == len(config.deepstack_visual_indexes)
    for level, (ours_at, theirs_at) in enumerate(zip(output.deepstack_features, deepstack, strict=True)):
        assert torch.equal(ours_at, theirs_at), f"DeepStack {level}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_tower_equals_transformers(family, dtype):
    assert_equal_towers(SMALL[family], dtype, MIXED_GRIDS)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, id=f"{family}-{dtype}", marks=() if family in REPRESENTATIVE else pytest.mark.long)
        for family in FAMILIES
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_one_block_of_full_size_equals_transformers(family, dtype):
    assert_equal_towers(one_block(FULL[family]), dtype, [[1, 16, 26], [2, 8, 10], [1, 2, 2]])


@pytest.mark.parametrize("variant", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_moe_models_have_the_tower_of_their_dense_twins(variant):
    assert_equal_towers(SMALL[variant.removesuffix("_moe")], torch.float32, MIXED_GRIDS, variant)


side = st.integers(1, 12).map(lambda n: 2 * n)
grids = st.lists(st.tuples(st.integers(1, 3), side, side).map(list), min_size=1, max_size=4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_any_mix_of_grids_equals_transformers(family):
    config = SMALL[family]
    hf = build_tower(config)
    ours = ours_from(hf, config)

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(grids)
    def check(batch):
        plan = GridPlan.build(batch, config)
        pixels = random_pixels(plan.num_patches, config)
        with torch.no_grad():
            output = ours(pixels, plan)
        hidden, tokens, _ = forward(hf, pixels, torch.tensor(batch))
        assert torch.equal(output.last_hidden_state, hidden)
        assert torch.equal(output.pooler_output, tokens)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family):
    config = SMALL[family]
    hf = build_tower(config)
    ours = ours_from(hf, config)
    plan = GridPlan.build([[1, 10, 8], [2, 4, 6]], config)
    pixels = random_pixels(plan.num_patches, config)
    ours_in, theirs_in = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    ours(ours_in, plan).pooler_output.square().mean().backward()
    hf(theirs_in, grid_thw=plan.grid_thw, return_dict=True).pooler_output.square().mean().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-5 * theirs_in.grad.abs().max())
    for block, twin in zip(ours.blocks, hf.blocks, strict=True):
        ours_at, theirs_at = block.attn.proj.weight.grad, twin.attn.proj.weight.grad
        torch.testing.assert_close(ours_at, theirs_at, rtol=1e-4, atol=1e-5 * theirs_at.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_item_has_the_same_features_alone_as_in_a_batch(family):
    config = SMALL[family]
    ours = ours_from(build_tower(config), config)
    plan = GridPlan.build(MIXED_GRIDS, config)
    pixels = random_pixels(plan.num_patches, config)
    with torch.no_grad():
        tokens_per_item = (plan.grid_thw.prod(dim=1) // config.merge_unit).tolist()
        tokens = ours(pixels, plan).pooler_output.split(tokens_per_item)
    patches = pixels.split(plan.grid_thw.prod(dim=1).tolist())
    for grid, part, expected in zip(MIXED_GRIDS, patches, tokens, strict=True):
        with torch.no_grad():
            alone = ours(part, GridPlan.build([grid], config)).pooler_output
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seeded_towers_do_not_amplify_rounding(family):
    """The bound of 1e-5 is meaningful only for towers that do not amplify a rounding error of the input."""
    config = SMALL[family]
    ours = ours_from(build_tower(config), config)
    plan = GridPlan.build(MIXED_GRIDS, config)
    pixels = random_pixels(plan.num_patches, config)
    perturbed = pixels * (1 + 1e-6 * random_pixels(plan.num_patches, config, seed=1))
    with torch.no_grad():
        change = Difference.of(ours(perturbed, plan).pooler_output, ours(pixels, plan).pooler_output)
    assert change.relative_l2 < 4e-6
