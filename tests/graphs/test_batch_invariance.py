"""An item's results are bitwise the same alone, in any batch, at any place in it, in any graph and without one."""

import random
from dataclasses import replace

import pytest
import torch

from qwenvit.encoder import Encoder
from qwenvit.graphs import graphed_tower
from qwenvit.graphs.capacity import MAX_GRAPH_PATCHES, capacity_for
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.fast import FastTower
from support.towers import FULL, narrow

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LARGE = (1, 120, 168)
"""Frame groups, rows and columns of patches of an image that most batches of the others are small beside."""
ITEMS = (
    (1, 2, 2),  # one token
    (1, 8, 8),  # one whole window
    (1, 2, 34),
    (1, 10, 6),
    (1, 16, 16),
    (1, 28, 28),  # fewer tokens than cuBLAS needs rows
    (1, 26, 38),
    (3, 4, 6),
    (2, 8, 8),
    (8, 32, 20),
    (1, 56, 56),  # on Hopper, tiles of its attention continue across heads when it is alone
    (1, 92, 34),
    (1, 84, 90),
)
DEPTH = 4
RANDOM_BATCHES = 40


def config_of(family, width):
    """Return a tower of a few blocks, some with windows and some without, of two heads or of full width."""
    if width == "narrow":
        return narrow(family, depth=DEPTH)
    config = FULL[family]
    full_attention = (1, DEPTH - 1) if config.fullatt_block_indexes else ()
    deepstack = (0, 2) if config.deepstack_visual_indexes else ()
    return replace(config, depth=DEPTH, fullatt_block_indexes=full_attention, deepstack_visual_indexes=deepstack)


def encoder(config, dtype):
    """Return an encoder with seeded weights of a trained tower's size, some of them outliers."""
    tower = FastTower(config).to("cuda", dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in tower.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device="cuda")
        if parameter.ndim > 1:
            values *= parameter.shape[1] ** -0.5
            values[:: max(2, len(values) // 3)] *= 10
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        parameter.copy_(values)
    return Encoder(tower)


def run(enc, items, graphed=True):
    """Return the outputs of a batch by name. An item's pixel values depend on its grid alone."""
    pixels = []
    for t, h, w in items:
        generator = torch.Generator("cuda").manual_seed(10**6 * t + 1000 * h + w)
        pixels.append(torch.randn(t * h * w, enc.config.patch_dim, generator=generator, device="cuda").to(enc.dtype))
    grid = torch.tensor(items)
    if graphed:
        shared = enc(torch.cat(pixels), grid)
        out = enc(torch.cat(pixels), grid)  # in a graph of its own: it comes twice in a row
        assert torch.equal(out.last_hidden_state, shared.last_hidden_state)
    else:
        out = enc.tower(torch.cat(pixels), GridPlan.build(grid, enc.config, "cuda"))
    layers = {f"DeepStack {i}": layer for i, layer in enumerate(out.deepstack_features)}
    return {"last hidden state": out.last_hidden_state, "tokens": out.pooler_output} | layers


def differences(enc, alone, items, graphed=True):
    """Run a batch, and return the items whose outputs are not bitwise those that they have alone."""
    found, start = [], 0
    batch = run(enc, items, graphed)
    for place, item in enumerate(items):
        end = start + item[0] * item[1] * item[2]
        for name, expected in alone(item).items():
            unit = 1 if name == "last hidden state" else enc.config.merge_unit
            got = batch[name][start // unit : end // unit]
            if not (got.isfinite().all() and torch.equal(got, expected)):
                found.append((name, item, f"number {place} of {items}", "graph" if graphed else "no graph"))
        start = end
    return found


def run_alone(enc):
    """Return a function that runs an item alone, in a graph, and remembers the outputs."""
    known = {}

    def alone(item):
        if item not in known:
            known[item] = run(enc, [item])
        return known[item]

    return alone


CASES = [(family, width, dtype) for family in FULL for width in ("narrow", "full")
         for dtype in (torch.bfloat16, torch.float16)]  # fmt: skip


@pytest.mark.parametrize(("family", "width", "dtype"), CASES, ids=str)
def test_bits_alone_and_in_batches(family, width, dtype, monkeypatch):
    enc = encoder(config_of(family, width), dtype)
    alone, rng = run_alone(enc), random.Random(0)
    everything = [*ITEMS, LARGE]
    assert sum(t * h * w for t, h, w in [*everything, LARGE]) > MAX_GRAPH_PATCHES
    batches = [everything[:-1], everything[:-1][::-1], [(1, 8, 8)] * 9, [(1, 2, 2), LARGE, (1, 2, 2)]]
    batches += [[item, item] for item in everything[:-1]]
    batches += [rng.choices(ITEMS, k=rng.randint(2, 9)) for _ in range(RANDOM_BATCHES)]
    found = [difference for items in batches for difference in differences(enc, alone, items)]
    for items in ([(1, 2, 2)], [(1, 8, 8)], [(1, 28, 28)], [(1, 8, 8), (1, 2, 2)], list(ITEMS), [*everything, LARGE]):
        found += differences(enc, alone, items, graphed=False)
    found += differences(enc, alone, [*everything, LARGE])  # too large for a graph
    monkeypatch.setattr(
        graphed_tower, "capacity_for", lambda need, unit: capacity_for(need._replace(patches=2 * need.patches), unit)
    )
    enc.tower.graphs._prepared.clear()
    for item in everything[:-1]:
        found += differences(enc, alone, [item])
    assert not found, "\n".join(map(str, [f"{len(found)} differ", *found[:20]]))
    assert not torch.equal(alone((1, 8, 8))["tokens"][:1], alone((2, 8, 8))["tokens"][:1])  # items are told apart
