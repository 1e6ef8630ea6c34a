"""Which config a tower is loaded with: its own, another by `config=`, or what tensors tell of an unknown model_type."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from qwenvit.towers import checkpoint
from qwenvit.weights.local import CheckpointError
from support.written_towers import SINGLE, assert_loaded, config_of, load, write


def test_a_single_file_without_config_json(tmp_path, tower):
    write(tmp_path / "whole", tower)
    file = tmp_path / "alone" / "tower.safetensors"
    file.parent.mkdir()
    (tmp_path / "whole" / SINGLE).rename(file)
    with pytest.raises(FileNotFoundError, match=r"no config\.json .*pass it as config="):
        load(file)
    path, content = tmp_path / "whole" / "config.json", config_of(tower)
    for config in (path, str(path), path.parent, content, {"vision_config": content}, load(file, config=path).config):
        assert_loaded(load(file, config=config), tower)
    assert_loaded(load(file.parent / file.name, config=content | {"model_type": "new"}, family=tower.family), tower)
    for nothing in (tmp_path / "nowhere.json", "qwen2_5_vl-7b", json.dumps(content) + " " * 5000):
        with pytest.raises(
            FileNotFoundError, match="config: expected an existing file or folder, a mapping or"
        ) as error:
            load(file, config=nothing)
        assert len(str(error.value)) < 500
    with pytest.raises(TypeError, match="config: expected a path, a mapping or a VisionConfig, got int"):
        load(file, config=3)
    with pytest.raises(ValueError, match=r"family: expected .* got 'qwen9'"):
        load(file, config=content, family="qwen9")


def test_config_wins_over_config_json(tmp_path, qwen3):
    write(tmp_path, qwen3, config=config_of(qwen3) | {"hidden_size": 32})
    with pytest.raises(CheckpointError, match="wrong shape"):
        load(tmp_path)
    assert_loaded(load(tmp_path, config=config_of(qwen3)), qwen3)


@pytest.mark.parametrize("known", ["neither", "inner", "outer"])
def test_an_unknown_model_type_is_settled_by_the_tensors(tmp_path, tower, known):
    """The tensors' names tell every family from the others."""
    inner = config_of(tower) | ({} if known == "inner" else {"model_type": "new_vision"})
    outer = {"model_type": tower.family if known == "outer" and "omni" not in tower.family else "qwen9_exp"}
    write(tmp_path, tower, config=outer | {"vision_config": inner})
    assert_loaded(load(tmp_path), tower)


def test_what_tensors_do_not_tell_is_not_guessed(tmp_path, tower):
    """Without a known model_type, a default that no shape shows would be silently wrong."""
    keys = {"num_heads", "window_size", "fullatt_block_indexes", "deepstack_visual_indexes"} & config_of(tower).keys()
    for key in sorted(keys):
        pruned = {name: value for name, value in config_of(tower).items() if name != key} | {"model_type": "new"}
        write(tmp_path, tower, config=pruned)
        with pytest.raises(ValueError, match=rf"'new'.*do not tell {key}, .*family='{tower.family}' takes"):
            load(tmp_path)


def test_an_unknown_model_type_with_a_broken_tower_says_both(tmp_path, qwen3):
    write(tmp_path, qwen3, config=config_of(qwen3) | {"model_type": "new"})
    save_file({name: t for name, t in qwen3.composite().items() if "merger" not in name}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"'new'.*family=.*incomplete vision tower under model\.visual\..*merger"):
        load(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, family="qwen3_vl")
    assert error.value.missing == [f"model.visual.{name}" for name in qwen3.state if "merger" in name]


def test_another_family_than_the_tensors_is_refused(tmp_path, qwen3):
    write(tmp_path, qwen3)
    with pytest.raises(CheckpointError, match=r"\(qwen3_omni\): these look like tensors of qwen3_vl"):
        load(tmp_path, family="qwen3_omni")
    with pytest.raises(ValueError, match=r"family: expected 'qwen3_vl', the family of config, got 'qwen3_5'"):
        load(tmp_path, config=load(tmp_path).config, family="qwen3_5")


def test_the_config_is_held_against_the_header_before_a_tower_is_built(tmp_path, qwen3, monkeypatch):
    monkeypatch.setattr(checkpoint, "tower_class", None)
    for change in ({"depth": 1000}, {"hidden_size": 2**16}, {"intermediate_size": 2**17}, {"depth": 1}):
        write(tmp_path, qwen3, config=config_of(qwen3) | {"deepstack_visual_indexes": [0]} | change)
        with pytest.raises(CheckpointError):
            load(tmp_path)
    write(tmp_path, qwen3, config=config_of(qwen3) | {"depth": 1000})
    with pytest.raises(CheckpointError, match=r"The config states 1000 blocks, and the checkpoint has 2\."):
        load(tmp_path)
    for field, value in product(("depth", "hidden_size", "num_position_embeddings"), (10**9, 2**60, 10**30)):
        write(tmp_path, qwen3, config=config_of(qwen3) | {field: value})
        with pytest.raises(ValueError, match=f"{field}|integers of at most 64 bits"):
            load(tmp_path)
    write(tmp_path, qwen3, config=config_of(qwen3) | {"depth": 4000})
    with pytest.raises(ValueError, match="depth"):
        load(tmp_path)


def test_numbers_that_python_writes_in_configs_are_read(tmp_path, qwen3):
    """Language models' configs have infinities, as time_step_limit of those with a state space."""
    config = {"model_type": "qwen3_vl", "vision_config": config_of(qwen3), "text_config": {"limit": [0, float("inf")]}}
    assert_loaded(load(write(tmp_path, qwen3, config=config)), qwen3)
    write(tmp_path, qwen3, config=config | {"vision_config": config_of(qwen3) | {"hidden_size": float("nan")}})
    with pytest.raises(ValueError, match="hidden_size"):
        load(tmp_path)


def test_processors_configs_beside_the_config_are_read_if_the_checkpoint_has_none(tmp_path, qwen3):
    write(tmp_path / "whole", qwen3)
    processor = {"image_mean": [0.25] * 3, "patch_size": 16}
    (tmp_path / "whole" / "preprocessor_config.json").write_text(json.dumps(processor))
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "whole" / SINGLE).rename(alone / SINGLE)
    for config in (tmp_path / "whole", tmp_path / "whole" / "config.json"):
        assert load(alone, config=config).image_processor.image_mean == (0.25, 0.25, 0.25)
    (alone / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.75] * 3}))
    assert load(alone, config=tmp_path / "whole").image_processor.image_mean == (0.75, 0.75, 0.75)


@pytest.mark.parametrize(("model_type", "family"), [("qwen4_exp", "qwen3_5"), ("cohere_compass", "qwen3_vl")])
def test_other_models_with_such_a_tower_give_transformers_bits(tmp_path, model_type, family):
    """Neither their own model_type nor that of their vision config is a name of a family."""
    module = pytest.importorskip(f"transformers.models.{model_type}.modeling_{model_type}")
    config = CONFIG_MAPPING[model_type]()
    for name, value in {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 100}.items():
        setattr(config.vision_config, name, value)
    if getattr(config.vision_config, "deepstack_visual_indexes", None):
        config.vision_config.deepstack_visual_indexes = [0, 1]
    [vision_class] = [value for name, value in vars(module).items() if name.endswith("VisionModel")]
    tower = vision_class(config.vision_config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_file({f"model.visual.{name}": tensor for name, tensor in tower.state_dict().items()}, tmp_path / SINGLE)
    config.save_pretrained(tmp_path)
    encoder = load(tmp_path, impl="reference", device="cpu")
    assert encoder.config.family == family
    grid = torch.tensor([[1, 8, 12], [1, 4, 4]])
    pixels = torch.randn(112, encoder.config.patch_dim, generator=generator)
    with torch.no_grad():
        ours, theirs = encoder(pixels, grid), tower(pixels, grid_thw=grid)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)
    for own, other in zip(ours.deepstack_features, getattr(theirs, "deepstack_features", None) or [], strict=True):
        assert torch.equal(own, other)
