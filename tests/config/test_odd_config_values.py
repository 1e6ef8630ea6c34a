"""Values that no config.json should have: every one is refused by name or means what it says, and none harms."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit.config.families import FAMILIES
from qwenvit.config.limits import LIMITS, positive_integer, shown
from qwenvit.config.vision_config import VisionConfig
from qwenvit.towers.reference import ReferenceTower
from support.towers import FULL

ODD = st.one_of(
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**31, 2**60, 2**63, -(2**63), 10**5000, 10**400]),
    st.floats(),
    st.booleans() | st.none(),
    st.text(max_size=20) | st.just("x" * 100_000),
    st.lists(st.integers() | st.text(max_size=3), max_size=4),
    st.sampled_from([list(range(100_000)), [[1]], {}, {"rope_theta": 10**400}, {"type": []}]),
)
FIELDS = [field.name for field in fields(VisionConfig)]
KEYS = (
    *("depth", "num_hidden_layers", "embed_dim", "hidden_size", "hidden_act", "mlp_ratio", "intermediate_size"),
    *("num_heads", "num_attention_heads", "in_channels", "in_chans", "patch_size", "spatial_patch_size"),
    *("spatial_merge_size", "temporal_patch_size", "out_hidden_size", "num_position_embeddings", "window_size"),
    *("deepstack_visual_indexes", "fullatt_block_indexes", "tokens_per_second", "rope_parameters", "rope_theta"),
    *("rope_scaling", "model_type", "vision_config", "thinker_config", "head_dim", "num_key_value_heads"),
)
PLACES = ("alone", "inside", "around")


def config_or_refusal(make: Callable[..., VisionConfig], *args: Any, **changes: Any) -> VisionConfig | str:
    """Return the config, or the message of the ValueError; any other error fails the test."""
    try:
        return make(*args, **changes)
    except ValueError as error:
        return str(error)


def edited(family: str, edits: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a config.json with edits in a vision config alone, in a nested one, or in what is around a nested one."""
    vision = FULL[family].to_hf()
    outer = {"model_type": FAMILIES[family].model_types[1]}
    if where == "alone":
        return vision | edits
    return outer | {"vision_config": vision | edits} if where == "inside" else outer | {"vision_config": vision} | edits


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=50)
@given(edits=st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=3), where=st.sampled_from(PLACES))
def test_odd_values_are_refused_by_name_or_kept(family: str, edits: dict[str, Any], where: str) -> None:
    config = edited(family, edits, where)
    ours = config_or_refusal(VisionConfig.from_hf, config)
    if isinstance(ours, str):
        assert len(ours) < 1000
        assert any(key in ours for key in (*edits, *FIELDS, "rope_type")), ours
        return
    assert VisionConfig.from_hf(ours.to_hf()) == ours
    if where == "around" and "vision_config" not in edits:  # what is beside a vision config does not change it
        assert ours == FULL[family]
    for key in edits.keys() & ours.to_hf().keys() - {"model_type", "rope_parameters", "fullatt_block_indexes"}:
        assert where == "around" or ours.to_hf()[key] == edits[key]


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_too_deep_for_recursion_are_refused_by_name_or_ignored(family: str, where: str, kind: type) -> None:
    deep: Any = kind()
    for _ in range(20_000):
        deep = [deep] if kind is list else {"a": deep}
    for key in KEYS:
        config = edited(family, {key: deep}, where)
        ours = config_or_refusal(VisionConfig.from_hf, config)
        if isinstance(ours, str):
            assert key in ours
            assert len(ours) < 1000
        config_or_refusal(VisionConfig.from_hf, {"one": config, "other": edited(family, {key: [deep]}, where)})
    while deep:  # Python frees nested mappings recursively
        (deep,) = deep.values() if kind is dict else deep


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_odd_fields_are_refused_by_name(family: str, data: st.DataObject) -> None:
    changes = {data.draw(st.sampled_from(FIELDS)): data.draw(ODD | st.lists(st.integers(0, 9)).map(tuple))}
    config = config_or_refusal(replace, FULL[family], **changes)
    if isinstance(config, str):
        assert len(config) < 1000
        assert any(field in config for field in FIELDS), config
    else:
        read = VisionConfig.from_hf(config.to_hf())
        if changes == {"tokens_per_second": None}:  # left out, and read as transformers' default
            assert read.tokens_per_second == (4 if family == "qwen2_5_vl" else None)
            read = replace(read, tokens_per_second=None)
        assert read == config
        hash(config)


@pytest.mark.parametrize("key", LIMITS)
def test_sizes_above_the_limit_are_refused(key: str) -> None:
    family = "qwen2_5_vl" if key in ("window_size", "tokens_per_second") else "qwen3_vl"
    for value in (LIMITS[key] + 1, 2**60, 10**5000):
        with pytest.raises(ValueError, match=f"{key}: expected at most {LIMITS[key]}, got"):
            replace(FULL[family], **{key: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_tower_has_weights_that_torch_can_address(family: str) -> None:
    sizes: dict[str, Any] = {name: limit for name, limit in LIMITS.items() if getattr(FULL[family], name) is not None}
    sizes |= {"depth": 1, "num_heads": 1, "fullatt_block_indexes": (), "deepstack_visual_indexes": ()}
    with torch.device("meta"):
        tower = ReferenceTower(replace(FULL[family], **sizes))
    assert max(weight.nbytes for weight in tower.parameters()) < 2**63
    assert max(weight.numel() for weight in tower.parameters()) <= 2**58


@pytest.mark.parametrize("theta", [0, -1.0, math.nan, math.inf, 10**400, 1e31, 1e-31, True, "1", None, [1]])
def test_rope_theta_of_no_tower(theta: Any) -> None:
    with pytest.raises(ValueError, match="rope_theta: expected a"):
        replace(FULL["qwen2_vl"], rope_theta=theta)


@pytest.mark.parametrize("theta", [1e-30, 1e30])
def test_the_extreme_rope_thetas_have_finite_frequencies(theta: float) -> None:
    replace(FULL["qwen2_vl"], rope_theta=theta)
    assert (theta ** -(torch.arange(0, 40, 2, dtype=torch.float) / 40)).isfinite().all()


@given(ODD)
@settings(deadline=None, max_examples=50)
def test_any_value_is_shown_in_short(value: Any) -> None:
    assert len(shown(value)) < 300
    with pytest.raises(ValueError, match="size: expected"):
        positive_integer("size", -1 if isinstance(value, int) and 0 < value < 2**31 else value)
