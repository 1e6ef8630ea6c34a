"""VisionConfig against published config.json files and transformers' config classes."""

import dataclasses
import json

import pytest

from common.hf_towers import build_tower, tower_class
from qwenvit.config.families import FAMILIES
from qwenvit.config.published import PUBLISHED, published_config
from qwenvit.config.vision_config import VisionConfig
from qwenvit.weights.names import NAME_TABLES
from support.towers import FULL, SMALL

QWEN2_VL_7B = {  # as published: no hidden_act, `in_chans` for in_channels, `hidden_size` is the output width
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}
QWEN2_5_VL_7B = {
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}
QWEN3_OMNI = {  # nested in thinker_config, with both spellings of in_channels and window fields that are null
    "model_type": "qwen3_omni_moe",
    "thinker_config": {
        "model_type": "qwen3_omni_moe_thinker",
        "vision_config": {
            "model_type": "qwen3_omni_moe_vision_encoder",
            "apply_vit_abs_pos_embed": True,
            "deepstack_visual_indexes": [8, 16, 24],
            "depth": 27,
            "fullatt_block_indexes": None,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "in_channels": 3,
            "in_chans": 3,
            "intermediate_size": 4304,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": None,
        },
    },
}


@pytest.mark.parametrize(
    ("config", "name"),
    [(QWEN2_VL_7B, "qwen2_vl-7b"), (QWEN2_5_VL_7B, "qwen2_5_vl-7b"), (QWEN3_OMNI, "qwen3_omni-30b-a3b")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_config_json_is_read(config, name):
    assert VisionConfig.from_hf(config) == PUBLISHED[name].config


@pytest.mark.parametrize("name", PUBLISHED)
def test_to_hf_and_back(name):
    config = PUBLISHED[name].config
    assert VisionConfig.from_hf(config.to_hf()) == config
    assert VisionConfig.from_hf({"model_type": config.to_hf()["model_type"], "vision_config": config.to_hf()}) == config
    assert published_config(PUBLISHED[name].repo_id) == config


@pytest.mark.parametrize("variant", [*SMALL, "qwen3_vl_moe", "qwen3_5_moe"])
def test_configs_written_by_transformers_are_read(variant, tmp_path):
    config = SMALL[variant.removesuffix("_moe")]
    build_tower(dataclasses.replace(config, depth=1, fullatt_block_indexes=(), deepstack_visual_indexes=()),
                variant=variant).config.save_pretrained(tmp_path)  # fmt: skip
    saved = json.loads((tmp_path / "config.json").read_text())
    read = VisionConfig.from_hf(saved)
    assert read == dataclasses.replace(
        config, depth=1, fullatt_block_indexes=(), deepstack_visual_indexes=(), tokens_per_second=read.tokens_per_second
    )
    reloaded = tower_class(variant).config_class.from_pretrained(tmp_path)
    assert reloaded.to_dict() == tower_class(variant).config_class(**saved).to_dict()


@pytest.mark.parametrize("where", ["beside", "rope_parameters", "rope_scaling"])
def test_rope_theta_is_read_where_transformers_reads_it(where):
    inside = {"rope_theta": 1000.0}
    theta = {"beside": inside, "rope_parameters": {where: inside}, "rope_scaling": {where: inside}}[where]
    config = edited(QWEN2_5_VL_7B, **theta)
    theirs = tower_class("qwen2_5_vl").config_class(**config["vision_config"] | {"in_channels": 3})
    assert VisionConfig.from_hf(config).rope_theta == theirs.rope_parameters["rope_theta"] == 1000.0


def edited(config, **changes):
    return config | {"vision_config": config["vision_config"] | changes}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava"}, "unknown model_type 'llava'"),
        ({"vision_config": {"depth": 1}}, "no model_type"),
        (edited(QWEN2_5_VL_7B | {"model_type": "llava"}, model_type="siglip"), "unknown model_type 'siglip'"),
        ({"model_type": ["qwen2_vl"], "vision_config": {}}, r"the model_type of the whole config, got \['qwen2_vl'\]"),
        (edited(QWEN2_5_VL_7B, model_type=3), "expected a string for the model_type of 'vision_config', got 3"),
        (edited(QWEN2_5_VL_7B, model_type="qwen2_vl"), "another family"),
        (edited(QWEN2_5_VL_7B, hidden_act="relu"), "hidden_act: expected one of"),
        (edited(QWEN2_5_VL_7B, in_channels=4), "two spellings of one value disagree"),
        (edited(QWEN2_5_VL_7B, num_heads=7), "do not split into 7 heads"),
        (edited(QWEN2_5_VL_7B, window_size=100), "multiple of patch_size x spatial_merge_size = 28"),
        (edited(QWEN2_5_VL_7B, fullatt_block_indexes=[-1, 7]), "below depth=32"),
        (edited(QWEN2_5_VL_7B, fullatt_block_indexes=7), "expected a list of block numbers, got 7"),
        (edited(QWEN2_5_VL_7B, fullatt_block_indexes=[15, 7]), "increasing"),
        (edited(QWEN2_5_VL_7B, depth=None), "depth: expected a positive integer, got None"),
        (edited(QWEN2_5_VL_7B, num_hidden_layers=31), "num_hidden_layers=31, depth=32"),
        (edited(QWEN2_5_VL_7B, spatial_patch_size=16), "spatial_patch_size=16, patch_size=14"),
        (edited(QWEN2_5_VL_7B, num_key_value_heads=8), "num_key_value_heads=8, num_heads=16"),
        (edited(QWEN2_5_VL_7B, head_dim=64), "head_dim=64, channels / num_heads=80"),
        (edited(QWEN2_VL_7B, intermediate_size=4304), "intermediate_size=4304, embed_dim x mlp_ratio=5120"),
        (edited(QWEN2_5_VL_7B, depth=0), "depth: expected a positive integer, got 0"),
        (
            edited(QWEN2_5_VL_7B, patch_size=[14, 14], spatial_patch_size=None),
            r"patch_size: expected a positive integer, got \[14, 14\]",
        ),
        (edited(QWEN2_5_VL_7B, rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn'"),
        (edited(QWEN2_5_VL_7B, rope_parameters=[1]), r"rope_parameters should be a mapping, got \[1\]"),
        (edited(QWEN2_5_VL_7B, rope_parameters={"rope_theta": 1000.0}, rope_theta=500.0), "1000.0 in rope_parameters"),
        (edited(QWEN2_5_VL_7B, rope_theta=-1), "rope_theta: expected a positive number, got -1"),
        (edited(QWEN2_5_VL_7B, rope_theta=float("nan")), "rope_theta: expected a positive number, got nan"),
        (edited(QWEN2_VL_7B, mlp_ratio="4"), "mlp_ratio: expected a positive integer, got '4'"),
        (edited(QWEN2_VL_7B, embed_dim=None), "embed_dim: expected a positive integer, got None"),
        ({"model_type": "qwen3_5", "vision_config": PUBLISHED["qwen3_vl-8b"].config.to_hf()}, "another family"),
        (PUBLISHED["qwen3_5-9b"].config.to_hf() | {"deepstack_visual_indexes": [3]}, "deepstack_visual_indexes"),
        (PUBLISHED["qwen3_vl-8b"].config.to_hf() | {"num_position_embeddings": 2300}, "square number"),
        (PUBLISHED["qwen3_5-9b"].config.to_hf() | {"apply_vit_abs_pos_embed": False}, "apply_vit_abs_pos_embed=False"),
        (
            {"thinker_config": edited(QWEN3_OMNI["thinker_config"], apply_vit_abs_pos_embed=False)},
            "apply_vit_abs_pos_embed=False",
        ),
        ({"model_type": "qwen2_vl", "vision_config": "none"}, "vision_config should be a mapping, got 'none'"),
        ({"model_type": "qwen2_5_omni", "thinker_config": [1]}, r"'thinker_config' should be a mapping, got \[1\]"),
    ],
)
def test_bad_config_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        VisionConfig.from_hf(config)


def test_block_numbers_that_transformers_never_reaches_have_no_effect():
    """Small copies of Qwen2.5-VL state the large model's blocks; transformers asks each block whether it is listed."""
    config = VisionConfig.from_hf(edited(QWEN2_5_VL_7B, depth=8))
    assert config.fullatt_block_indexes == (7,)
    assert VisionConfig.from_hf(edited(QWEN2_5_VL_7B, depth=7)).fullatt_block_indexes == ()


def test_mlp_ratio_as_transformers_4_took_it():
    assert VisionConfig.from_hf(edited(QWEN2_VL_7B, mlp_ratio=4.0)) == PUBLISHED["qwen2_vl-7b"].config


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2_vl", {"fullatt_block_indexes": (3,)}, "fullatt_block_indexes: qwen2_vl towers have no windows"),
        ("qwen3_vl", {"tokens_per_second": 2}, "tokens_per_second: qwen3_vl configs have none"),
        ("qwen2_5_vl", {"fullatt_block_indexes": (7, 32)}, "below depth=32"),
        ("qwen2_5_vl", {"fullatt_block_indexes": (True,)}, "below depth=32"),
        ("qwen2_5_vl", {"window_size": None}, "window_size: qwen2_5_vl towers have windows"),
        ("qwen3_5", {"window_size": 112}, "window_size: qwen3_5 towers have no windows"),
        ("qwen3_5", {"num_position_embeddings": None}, "num_position_embeddings: qwen3_5 towers have learned"),
        ("qwen2_vl", {"num_position_embeddings": 4}, "num_position_embeddings: qwen2_vl towers have no learned"),
        ("qwen3_5", {"family": ["qwen3_5"]}, "family: expected one of"),
    ],
)
def test_values_that_to_hf_could_not_write_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FULL[family], **changes)


@pytest.mark.parametrize("family", ["qwen9", "", ["qwen2_vl"], 3])
def test_unknown_family(family):
    with pytest.raises(ValueError, match="family: expected one of"):
        VisionConfig.from_hf(QWEN2_VL_7B, family)


def test_not_a_mapping():
    with pytest.raises(TypeError, match="config: expected a mapping"):
        VisionConfig.from_hf("config.json")


def test_unknown_published_name():
    with pytest.raises(ValueError, match="expected one of qwen2_vl-2b"):
        published_config("qwen9")


def test_every_family_has_a_name_table_and_a_published_tower():
    assert set(FAMILIES) == set(NAME_TABLES) == {c.config.family for c in PUBLISHED.values()}
