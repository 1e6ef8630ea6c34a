"""Vision configs nested in any way: found by content and type, not by the names around them."""

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from qwenvit.config.families import FAMILIES, FAMILY_OF_MODEL_TYPE, UnknownModelType
from qwenvit.config.hf_config import family_of, unstated_choices
from qwenvit.config.vision_config import VisionConfig
from support.pinned import needs_pinned_transformers
from support.towers import FULL

# The parts that stand beside vision configs in published config.json files.
TEXT = {"model_type": "qwen2", "vocab_size": 9, "num_key_value_heads": 2, "hidden_size": 64, "rms_norm_eps": 1e-6}
TALKER = TEXT | {"model_type": "qwen2_5_omni_talker", "spatial_merge_size": 2, "rope_scaling": {"type": "default"}}
AUDIO = {"model_type": "qwen2_5_omni_audio_encoder", "d_model": 64, "num_mel_bins": 8, "num_hidden_layers": 2}
PROCESSOR = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5]}
OTHERS = [TEXT, TALKER, AUDIO, PROCESSOR, {"0": "LABEL_0"}, {}, "text", None, 3, [1, 2], [{"depth": 3}]]

DEEPEST = 5
"""How many mappings may be around a vision config."""

keys = st.text("abcdefghij_", min_size=1, max_size=12).filter(lambda key: key != "vision_config")
unknown_types = st.sampled_from(["colqwen2", "qwen4_exp", "cosmos3_omni", "my_vision", "siglip_vision_model", ""])
families = st.sampled_from(sorted(FAMILIES))


@st.composite
def wrapped(
    draw: st.DrawFn, inner: Any, model_type: st.SearchStrategy[str], least: int = 0, most: int = DEEPEST
) -> dict[str, Any]:
    """Draw a config.json that contains `inner` under any keys, from `least` to `most` deep, with other parts beside it.

    Each mapping around it has a `model_type` if `least` is above 0, and may have one otherwise.
    """
    key = draw(st.just("vision_config") | keys)
    for _ in range(draw(st.integers(least, most))):
        around = draw(st.dictionaries(keys, st.sampled_from(OTHERS), max_size=3))
        if least or draw(st.booleans()):
            around["model_type"] = draw(model_type)
        inner = around | {key: inner}
        key = draw(keys)
    return inner


@settings(deadline=None, max_examples=50)
@given(data=st.data(), family=families)
def test_a_known_vision_type_is_enough_in_any_model(data: st.DataObject, family: str) -> None:
    vision = FULL[family].to_hf()
    config = data.draw(wrapped(vision, unknown_types))
    assert VisionConfig.from_hf(config) == FULL[family]
    assert family_of(config) == family


@settings(deadline=None, max_examples=50)
@given(data=st.data(), family=families)
def test_a_known_model_type_is_enough_for_any_vision_type(data: st.DataObject, family: str) -> None:
    vision = FULL[family].to_hf() | {"model_type": data.draw(unknown_types)}
    whole_models = [name for name in FAMILIES[family].model_types if "_vision" not in name]
    config = data.draw(wrapped(vision, st.sampled_from(whole_models), least=1))
    assert VisionConfig.from_hf(config) == FULL[family]


@settings(deadline=None, max_examples=50)
@given(data=st.data(), family=families)
def test_without_a_known_type_the_family_is_asked_for(data: st.DataObject, family: str) -> None:
    config = data.draw(wrapped(FULL[family].to_hf() | {"model_type": data.draw(unknown_types)}, unknown_types))
    with pytest.raises(UnknownModelType, match=r"no model_type|unknown model_type"):
        VisionConfig.from_hf(config)
    with pytest.raises(UnknownModelType):
        family_of(config)
    assert VisionConfig.from_hf(config, family) == FULL[family]
    assert family_of(config, family) == family
    assert unstated_choices(config, family) == []


@settings(deadline=None, max_examples=50)
@given(data=st.data(), family=families, other=families)
def test_the_callers_family_overrides_every_model_type(data: st.DataObject, family: str, other: str) -> None:
    vision = FULL[family].to_hf() | {"model_type": FAMILIES[other].model_types[0]}
    config = data.draw(wrapped(vision, st.sampled_from(sorted(FAMILY_OF_MODEL_TYPE))))
    assert VisionConfig.from_hf(config, family) == FULL[family]


@needs_pinned_transformers
@pytest.mark.parametrize(
    ("model_type", "family", "path"),
    [
        ("qwen2_vl", None, "vision_config"),
        ("qwen2_5_omni", None, "thinker_config.vision_config"),
        ("qwen3_omni_moe", None, "thinker_config.vision_config"),
        ("qwen3_5_moe", None, "vision_config"),
        ("colqwen2", None, "vlm_config.vision_config"),
        ("cosmos3_omni", None, "vision_config"),
        ("hyperclovax_vision_v2", None, "vision_config"),
        ("qwen4_exp", "qwen3_5", "vision_config"),
        ("cohere_compass", "qwen3_vl", "vision_config"),
    ],
)
def test_models_of_transformers(model_type: str, family: str | None, path: str) -> None:
    config = vision = AutoConfig.for_model(model_type).to_dict()
    for key in path.split("."):
        vision = vision[key]
    if family is not None:
        with pytest.raises(UnknownModelType):
            VisionConfig.from_hf(config)
    ours = VisionConfig.from_hf(config, family)
    assert {key: value for key, value in ours.to_hf().items() if key != "model_type"}.items() <= {
        key: list(value) if isinstance(value, tuple) else value for key, value in vision.items()
    }.items()


@needs_pinned_transformers
def test_the_key_value_heads_of_another_tower_with_the_same_names_are_refused() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads=8, num_heads=16"):
        VisionConfig.from_hf(AutoConfig.for_model("exaone4_5").to_dict(), "qwen2_5_vl")


@settings(deadline=None, max_examples=50)
@given(data=st.data(), family=families)
def test_two_different_vision_configs_are_refused_by_name(data: st.DataObject, family: str) -> None:
    vision = FULL[family].to_hf()
    changed = replace(FULL[family], depth=FULL[family].depth + 1).to_hf()

    def nested(inner: dict[str, Any]) -> dict[str, Any]:
        return {"vision_config": data.draw(wrapped(inner, unknown_types, most=2))}

    one = nested(vision)
    same = copy.deepcopy(vision) | {"model_type": FAMILIES[family].model_types[1]}  # as older transformers wrote it
    assert VisionConfig.from_hf({"one": one, "other": nested(same)}) == FULL[family]
    with pytest.raises(ValueError, match=r"two different ones, '(one|other)\..*' and '(one|other)\."):
        VisionConfig.from_hf({"one": one, "other": nested(changed)})


def test_a_vision_config_inside_another_is_refused() -> None:
    for vision in (FULL["qwen2_vl"].to_hf(), FULL["qwen2_vl"].to_hf() | {"num_key_value_heads": 16}):
        config = {"model_type": "qwen2_vl", "vision_config": vision | {"vision_config": {}}}
        with pytest.raises(ValueError, match=r"'vision_config' and 'vision_config\.vision_config'"):
            VisionConfig.from_hf(config)
    assert VisionConfig.from_hf({"vision_config": {"vision_config": vision}}) == FULL["qwen2_vl"]


def test_the_named_family_chooses_among_two() -> None:
    towers = {family: {"vision_config": FULL[family].to_hf()} for family in ("qwen2_vl", "qwen3_5")}
    with pytest.raises(ValueError, match=r"'qwen2_vl\.vision_config' and 'qwen3_5\.vision_config'"):
        VisionConfig.from_hf(towers)
    for family in towers:
        assert VisionConfig.from_hf(towers, family) == FULL[family]


@pytest.mark.parametrize("outer", ["two", "qwen3_vl"])
def test_another_vision_model_beside_the_tower_is_passed_over(outer: str) -> None:
    siglip = {"model_type": "siglip_vision_model", "hidden_size": 1152, "patch_size": 14, "num_hidden_layers": 27}
    config = {"segmenter": {"vision_config": siglip}, "vlm": {"vision_config": FULL["qwen3_vl"].to_hf()}}
    assert VisionConfig.from_hf(config | {"model_type": outer}) == FULL["qwen3_vl"]
    if outer == "two":
        del siglip["model_type"]
        assert VisionConfig.from_hf(config) == FULL["qwen3_vl"]


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (TEXT, "qwen2_vl"),  # a language model
        ({"model_type": "llava", "text_config": TEXT}, "qwen2_vl"),
        ({"dtype": "bfloat16"}, "qwen3_5"),
        (PROCESSOR | {"vocab_size": 3}, "qwen3_5"),
        ({"model_type": "omni", "talker": {"spatial_merge_size": 2, "model_type": "talker"}}, "qwen2_5_omni"),
    ],
)
def test_defaults_are_not_guessed_for_a_config_without_a_vision_config(config: dict[str, Any], family: str) -> None:
    with pytest.raises(UnknownModelType, match="no vision config"):
        VisionConfig.from_hf(config)
    with pytest.raises(ValueError, match=f"expected a {family} vision config, got none among"):
        VisionConfig.from_hf(config, family)


def test_what_is_left_out_under_an_unknown_type_is_listed() -> None:
    """The names of tensors tell the family, and their shapes the sizes, but not the number of heads."""
    config = {
        "model_type": "my_model",
        "vision_config": {"depth": 2, "hidden_size": 64, "deepstack_visual_indexes": []},
    }
    assert unstated_choices(config, "qwen3_vl") == ["num_heads", "hidden_act"]
    config["vision_config"]["num_attention_heads"] = 4
    assert unstated_choices(config, "qwen3_vl") == ["hidden_act"]
    assert unstated_choices(config, "qwen2_vl") == []


def test_the_search_is_bounded() -> None:
    vision = FULL["qwen2_vl"].to_hf()
    deep: Any = vision
    for _ in range(DEEPEST + 1):
        deep = {"inner": deep}
    with pytest.raises(UnknownModelType, match="no vision config"):
        VisionConfig.from_hf(deep)
    cycle: dict[str, Any] = {"vlm": {"vision_config": vision}}
    cycle["vlm"]["self"] = cycle
    assert VisionConfig.from_hf(cycle) == FULL["qwen2_vl"]
    wide = {"k" * 1000: {str(n): {"vision_config": {"depth": 1, "n": n}} for n in range(20_000)}}
    start = time.monotonic()
    with pytest.raises(ValueError, match="two different ones"):
        VisionConfig.from_hf(wide)
    shared: Any = {"vision_config": vision}
    for _ in range(DEEPEST - 1):
        shared = {str(n): shared for n in range(100)}  # 100 ** 4 ways to one vision config
    assert VisionConfig.from_hf(shared) == FULL["qwen2_vl"]
    endless: Any = {}
    for _ in range(20_000):
        endless = {"inner": endless}
    with pytest.raises(UnknownModelType):
        VisionConfig.from_hf(endless)
    assert time.monotonic() - start < 8
    while endless:  # Python frees deeply nested mappings recursively
        endless = endless["inner"]


def test_any_mapping_is_read() -> None:
    class Frozen(Mapping[str, Any]):
        def __init__(self, values: dict[str, Any]) -> None:
            self._values = values

        def __getitem__(self, key: str) -> Any:
            return self._values[key]

        def __iter__(self) -> Any:
            return iter(self._values)

        def __len__(self) -> int:
            return len(self._values)

    assert (
        VisionConfig.from_hf(Frozen({"vlm": Frozen({"vision_config": Frozen(FULL["qwen3_vl"].to_hf())})}))
        == (FULL["qwen3_vl"])
    )
