"""The shapes that a config states are those of the towers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit.config.published import PUBLISHED
from qwenvit.towers import shapes
from qwenvit.towers.cost import parameters
from qwenvit.towers.reference import ReferenceTower
from qwenvit.towers.shapes import weight_shapes
from support.towers import SMALL


def assert_shapes_of_a_built_tower(config):
    with torch.device("meta"):
        built = {name: tensor.shape for name, tensor in ReferenceTower(config).state_dict().items()}
    found = weight_shapes(config)
    assert found == built
    assert list(found) == list(built)
    assert parameters(config) == sum(shape.numel() for shape in built.values())


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(list(SMALL)), st.data())
def test_shapes_of_any_config(family, data):
    depth = data.draw(st.integers(1, 12))
    blocks = data.draw(st.sets(st.integers(0, depth - 1)).map(lambda found: tuple(sorted(found))))
    config = SMALL[family]
    changes = {"depth": depth, "hidden_size": 4 * config.num_heads * data.draw(st.integers(1, 8))}
    changes["intermediate_size"] = changes["hidden_size"] * data.draw(st.integers(1, 4))
    changes["out_hidden_size"] = data.draw(st.integers(1, 99))
    changes["deepstack_visual_indexes"] = blocks if config.traits.deepstack else ()
    changes["fullatt_block_indexes"] = blocks if config.traits.windowed else ()
    assert_shapes_of_a_built_tower(replace(config, **changes))


@pytest.mark.parametrize("name", ["qwen2_5_vl-7b", "qwen3_vl-2b", "qwen3_5-0.8b"])
def test_shapes_of_published_towers(name):
    assert_shapes_of_a_built_tower(PUBLISHED[name].config)


def test_only_one_block_is_built(monkeypatch):
    built = []

    def build(config):
        built.append(config.depth)
        return ReferenceTower(config)

    monkeypatch.setattr(shapes, "ReferenceTower", build)
    assert len(weight_shapes(replace(SMALL["qwen3_vl"], depth=1000))) > 12_000
    assert built == [1]
