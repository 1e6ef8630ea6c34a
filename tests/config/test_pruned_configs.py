"""Vision configs with any keys left out, against transformers' config classes built from the same dict."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from common.hf_towers import tower_class
from qwenvit.config.families import FAMILIES
from qwenvit.config.vision_config import VisionConfig
from support.pinned import needs_pinned_transformers
from support.towers import FULL

pytestmark = needs_pinned_transformers
VARIANTS = {family: family for family in FAMILIES} | {"qwen3_vl_moe": "qwen3_vl", "qwen3_5_moe": "qwen3_5"}
"""Families, and transformers' other classes, by the names of `common.hf_towers`."""
STATED: dict[str, list[Any]] = {
    "depth": [1, 9, 25, 32, 40],
    "embed_dim": [64, 1280],
    "hidden_size": [768, 1280],
    "hidden_act": ["silu", "gelu"],
    "mlp_ratio": [1, 4],
    "intermediate_size": [100, 3420],
    "num_heads": [1, 8, 16],
    "in_channels": [1, 3],
    "patch_size": [14, 16],
    "spatial_merge_size": [1, 2],
    "temporal_patch_size": [1, 2],
    "out_hidden_size": [2048],
    "window_size": [56, 112, 448],
    "fullatt_block_indexes": [[], [0], [7, 15, 23, 31]],
    "num_position_embeddings": [4, 2304],
    "deepstack_visual_indexes": [[], [0], [5, 11, 17]],
    "tokens_per_second": [1, 25],
    "rope_parameters": [{}, {"rope_theta": 500.0}, {"rope_type": "default"}, None],
    "rope_theta": [500.0],
}
"""Values that a vision config may state; the combinations include ones that no tower can have."""
SPELLINGS = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads"}


@st.composite
def pruned_configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Draw a vision config that states some of its family's keys, under either spelling."""
    stated = {"tokens_per_second", "rope_theta"} & {*STATED} | {*FULL[family].to_hf()} - {"model_type"}
    if family not in ("qwen2_5_vl", "qwen2_5_omni"):
        stated -= {"tokens_per_second"}
    config = {}
    for key in draw(st.sets(st.sampled_from(sorted(stated)))):
        name = SPELLINGS[key] if key in SPELLINGS and draw(st.booleans()) else key
        config[name] = draw(st.sampled_from(STATED[key]))
    if config.get("rope_parameters"):  # beside a rope_theta of its own, the outer one is a contradiction
        config.pop("rope_theta", None)
    return config


def no_tower_can_have(theirs: Any) -> bool:
    """Return whether transformers' config, which is not checked, has values that do not make a tower."""
    width = getattr(theirs, "embed_dim", theirs.hidden_size)
    window = getattr(theirs, "window_size", None)
    deepstack = getattr(theirs, "deepstack_visual_indexes", [])
    return bool(
        width % theirs.num_heads
        or width // theirs.num_heads % 4
        or (window and window % (theirs.patch_size * theirs.spatial_merge_size))
        or (deepstack and max(deepstack) >= theirs.depth)
    )


def check_same(ours: VisionConfig, theirs: Any) -> None:
    """Assert that our config has every value that transformers' has."""
    for key, value in ours.to_hf().items():
        expected = getattr(theirs, key)
        if key == "fullatt_block_indexes":  # of blocks that exist
            expected = [index for index in expected if index < theirs.depth]
        if key.endswith("_indexes"):
            expected = list(expected)
        if key != "model_type":
            assert value == expected, key


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_is_left_out_is_transformers_default(variant: str, data: st.DataObject) -> None:
    vision = data.draw(pruned_configs(VARIANTS[variant]))
    config_class = tower_class(variant).config_class
    theirs = config_class(**copy.deepcopy(vision))
    alone = vision | {"model_type": config_class.model_type}
    composite = {
        "model_type": data.draw(st.sampled_from(FAMILIES[VARIANTS[variant]].model_types)),
        "vision_config": vision,
    }
    for config, family in (
        (alone, None),
        (composite, None),
        (composite, VARIANTS[variant]),
        (vision, VARIANTS[variant]),
    ):
        if no_tower_can_have(theirs):
            with pytest.raises(ValueError, match=r"num_heads|window_size|deepstack_visual_indexes"):
                VisionConfig.from_hf(config, family)
        else:
            check_same(VisionConfig.from_hf(config, family), theirs)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_whole_models_give_their_tower_the_same_defaults(variant: str, data: st.DataObject) -> None:
    vision = data.draw(pruned_configs(VARIANTS[variant]))
    outer = tower_class(variant).config_class.model_type.partition("_vision")[0]
    nested = {"vision_config": vision} if data.draw(st.booleans()) else {}
    if "omni" in variant:
        nested = {"thinker_config": nested} if data.draw(st.booleans()) else {}
    model = AutoConfig.for_model(outer, **copy.deepcopy(nested))
    theirs = getattr(model, "thinker_config", model).vision_config
    if not no_tower_can_have(theirs):
        check_same(VisionConfig.from_hf({"model_type": outer, **nested}), theirs)


def test_the_smallest_config_that_transformers_wrote() -> None:
    vision = {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14}
    config = VisionConfig.from_hf({"model_type": "qwen2_vl", "vision_config": vision})
    assert (config.depth, config.hidden_size, config.num_heads, config.out_hidden_size) == (32, 1280, 16, 1536)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_to_hf_states_every_value(family: str, data: st.DataObject) -> None:
    vision = data.draw(pruned_configs(family))
    try:
        config = VisionConfig.from_hf(vision, family)
    except ValueError:
        return
    assert VisionConfig.from_hf(config.to_hf()) == config
    theirs = tower_class(family).config_class(**config.to_hf())
    check_same(config, theirs)
    assert VisionConfig.from_hf(theirs.to_dict()) == config
