"""Mutants, towers with one plausible mistake each: the parity gate must fail every one.

Each mutant is a narrow tower of a published depth with transformers' weights. The reference tower must fail both rules,
exact equality (used on the CPU) and 1e-5 relative L2 in fp32 (used elsewhere); the fast tower must fail the second.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from common.hf_towers import build_tower, forward
from qwenvit.ops.packing import adjacent_pairs
from qwenvit.parity import close, exact
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.rope import rope_cos_sin
from qwenvit.towers.fast import FastTower
from support.towers import SMALL, narrow, ours_from, random_pixels

GRIDS = [[1, 16, 26], [2, 8, 14]]


def drop_rope_in_one_block(tower, plan):
    block = tower.blocks[len(tower.blocks) // 2]
    forward = block.forward
    block.forward = lambda x, cos, sin, *segments: forward(x, torch.ones_like(cos), torch.zeros_like(sin), *segments)
    return plan


def swap_rows_and_columns(tower, plan):
    cos, sin = rope_cos_sin(plan.position_ids.flip(1), tower.config.head_dim, tower.config.rope_theta)
    return replace(plan, cos=cos, sin=sin)


def misplace_a_full_attention_block(tower, plan):
    indexes = (*tower.config.fullatt_block_indexes[:-1], tower.config.fullatt_block_indexes[-1] - 1)
    tower.config = replace(tower.config, fullatt_block_indexes=indexes)
    return plan


def scale_softmax_by_two_percent(tower, plan):
    for block in tower.blocks:
        block.attn.scale *= 1.02
    return plan


def approximate_gelu_in_the_merger(tower, plan):
    tower.merger.act = nn.GELU(approximate="tanh")
    return plan


def reorder_deepstack(tower, plan):
    first, second, *rest = tower.deepstack_mergers
    tower.deepstack_mergers = nn.ModuleList([second, first, *rest])
    return plan


def order_windows_by_columns(tower, plan):
    wrong = plan.window_index.clone()
    wrong[:16] = wrong[:16].reshape(4, 4).T.flatten()
    return replace(plan, window_index=wrong, restore_index=wrong.argsort())


def enlarge_eps(tower, plan):
    for module in tower.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-5
    return plan


def shift_one_position_tap(tower, plan):
    taps = plan.position_taps.clone()
    taps[7, 2] += 1
    return replace(plan, position_taps=taps)


MUTANTS = [
    ("qwen2_5_vl", drop_rope_in_one_block),
    ("qwen3_vl", drop_rope_in_one_block),
    ("qwen2_5_vl", swap_rows_and_columns),
    ("qwen3_vl", swap_rows_and_columns),
    ("qwen2_5_vl", misplace_a_full_attention_block),
    ("qwen2_5_vl", scale_softmax_by_two_percent),
    ("qwen3_vl", scale_softmax_by_two_percent),
    ("qwen2_5_vl", approximate_gelu_in_the_merger),
    ("qwen3_vl", approximate_gelu_in_the_merger),
    ("qwen3_vl", reorder_deepstack),
    ("qwen2_5_vl", order_windows_by_columns),
    ("qwen2_5_vl", enlarge_eps),
    ("qwen3_vl", enlarge_eps),
    ("qwen3_vl", shift_one_position_tap),
]


def load_qkv_without_making_pairs_adjacent(tower, plan):
    attention = tower.blocks[3].attn
    order = adjacent_pairs(attention.num_heads, tower.config.head_dim).argsort()[: 2 * tower.config.hidden_size]
    for rows in (attention.qkv.weight, attention.qkv.bias):
        rows[: len(order)] = rows[order]
    return plan


def swap_gate_and_up(tower, plan):
    weight = tower.blocks[3].mlp.gate_up.weight
    weight.copy_(weight.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
    return plan


def scale_queries_by_two_percent(tower, plan):
    for block in tower.blocks:
        block.attn.qkv.weight[: tower.config.hidden_size] *= 1.02
        block.attn.qkv.bias[: tower.config.hidden_size] *= 1.02
    return plan


def lose_the_bias_of_one_mlp(tower, plan):
    mlp = tower.blocks[3].mlp
    (mlp.down if tower.config.traits.gated_mlp else mlp.fc2).bias.zero_()
    return plan


FAST_MUTANTS = [
    ("qwen2_5_vl", drop_rope_in_one_block),
    ("qwen3_vl", drop_rope_in_one_block),
    ("qwen2_5_vl", swap_rows_and_columns),
    ("qwen2_5_vl", misplace_a_full_attention_block),
    ("qwen2_5_vl", scale_queries_by_two_percent),
    ("qwen3_vl", scale_queries_by_two_percent),
    ("qwen3_vl", reorder_deepstack),
    ("qwen2_5_vl", order_windows_by_columns),
    ("qwen3_vl", shift_one_position_tap),
    ("qwen2_5_vl", load_qkv_without_making_pairs_adjacent),
    ("qwen3_vl", load_qkv_without_making_pairs_adjacent),
    ("qwen2_5_vl", swap_gate_and_up),
    ("qwen2_5_vl", lose_the_bias_of_one_mlp),
    ("qwen3_vl", lose_the_bias_of_one_mlp),
]


def outputs(config, hf, tower, mutate):
    """Return `(name, tensor, transformers' tensor)` for each output of a tower after `mutate`."""
    plan = GridPlan.build(GRIDS, config)
    pixels = random_pixels(plan.num_patches, config)
    plan = mutate(tower, plan)
    with torch.no_grad():
        output = tower(pixels, plan)
    _, tokens, deepstack = forward(hf, pixels, plan.grid_thw)
    layers = zip(output.deepstack_features, deepstack, strict=True)
    return [("tokens", output.pooler_output, tokens), *((f"DeepStack {i}", *pair) for i, pair in enumerate(layers))]


def gate(family, mutate):
    """Return the checks of both rules on the reference tower and its plan after `mutate`."""
    hf = build_tower(SMALL[family])
    pairs = outputs(SMALL[family], hf, ours_from(hf, SMALL[family]), mutate)
    return [exact(*pair) for pair in pairs], [close(*pair) for pair in pairs]


def fast_gate(family, mutate):
    """Return the checks of the second rule on the fast tower, in plain torch, and its plan after `mutate`."""
    config = narrow(family, intermediate_size=192)
    hf = build_tower(config)
    tower = FastTower(config, "reference")
    tower.load_state_dict(ours_from(hf, config).state_dict())
    return [close(*pair) for pair in outputs(config, hf, tower, mutate)]


@pytest.mark.parametrize(("family", "mutate"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_gate_fails_the_mutant(family, mutate):
    for checks in gate(family, mutate):
        assert not all(check.passed for check in checks), checks


@pytest.mark.parametrize(("family", "mutate"), FAST_MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_gate_fails_the_fast_mutant(family, mutate):
    checks = fast_gate(family, mutate)
    assert not all(check.passed for check in checks), checks


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_gate_passes_the_towers_themselves(family):
    for checks in (*gate(family, lambda _, plan: plan), fast_gate(family, lambda _, plan: plan)):
        assert all(check.passed for check in checks), checks
