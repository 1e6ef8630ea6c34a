"""Whatever checkpoint people have is loaded by `Encoder.from_pretrained`, or refused by name."""

import json
import warnings
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

import qwenvit
from qwenvit import cli, default_encoder
from qwenvit.encoder import Encoder
from qwenvit.towers import checkpoint
from qwenvit.weights.local import CheckpointError
from support.tiny_adapters import base_model, differing, merged_by_peft, wrap
from support.tiny_models import visual
from support.tiny_towers import FAMILIES, Tower, build, save_sharded

SINGLE, COMMIT, OTHER = "model.safetensors", "0123456789abcdef" * 2 + "01234567", "f" * 40
load = partial(Encoder.from_pretrained, device="cpu")  # whose dtype is float32, as the tensors written here


def build_tower(family: str) -> Tower:
    # The patches of each family's processors, and windows that our towers accept.
    patch = 14 if family.startswith("qwen2") else 16
    windows = {"window_size": 56, "fullatt_block_indexes": [1]} if family.startswith("qwen2_5") else {}
    return build(family, patch_size=patch, **windows)


@pytest.fixture(scope="module", params=FAMILIES)
def tower(request: pytest.FixtureRequest) -> Tower:
    return build_tower(request.param)


@pytest.fixture(scope="module")
def qwen3() -> Tower:
    return build_tower("qwen3_vl")


def config_of(tower: Tower) -> dict[str, object]:
    return tower.model.config.to_dict()


def write(folder: Path, tower: Tower, prefix: str | None = None, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tower.composite(prefix), folder / SINGLE)
    (folder / "config.json").write_text(json.dumps(config_of(tower) if config is None else config))
    return folder


def assert_loaded(encoder: Encoder, tower: Tower) -> None:
    assert encoder.config.family == tower.family
    assert differing(encoder.tower.state_dict(), tower.canonical) == []


@pytest.mark.parametrize("prefix", ["vlm.visual.", "base_model.model.model.visual.", "vision_tower.", ""])
def test_any_prefix(tmp_path, tower, prefix):
    assert_loaded(load(write(tmp_path, tower, prefix)), tower)


def test_a_subfolder_of_a_pipeline(tmp_path, tower, capsys):
    write(tmp_path / "text_encoder", tower)
    (tmp_path / "model_index.json").write_text("{}")
    assert_loaded(load(tmp_path, subfolder="text_encoder"), tower)
    assert_loaded(load(tmp_path, subfolder="text_encoder/"), tower)
    with pytest.raises(FileNotFoundError, match=r"no folder 'vae'; it has: text_encoder"):
        load(tmp_path, subfolder="vae")
    with pytest.raises(ValueError, match=r"subfolder: .*a file"):
        load(tmp_path / "text_encoder" / SINGLE, subfolder="x")
    for outside in ("../x", "/etc", "a/../.."):
        with pytest.raises(ValueError, match="subfolder: expected a folder"):
            load(tmp_path, subfolder=outside)


def cache(folder: Path, tower: Tower, commits: list[str], main: str | None) -> Path:
    """Write a repository as huggingface_hub's cache has it: links into a folder of blobs."""
    repository = folder / "models--org--name"
    for commit in commits:
        snapshot = repository / "snapshots" / commit
        write(repository / "blobs" / commit, tower)
        snapshot.mkdir(parents=True)
        for name in (SINGLE, "config.json"):
            (snapshot / name).symlink_to(f"../../blobs/{commit}/{name}")
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


@pytest.mark.parametrize(("commits", "main"), [([COMMIT], None), ([COMMIT, OTHER], COMMIT), ([OTHER, COMMIT], COMMIT)])
def test_a_folder_of_the_hubs_cache(tmp_path, qwen3, commits, main):
    repository = cache(tmp_path, qwen3, commits, main)
    snapshot = repository / "snapshots" / COMMIT
    for other in set(commits) - {COMMIT}:
        (repository / "snapshots" / other / SINGLE).unlink()
    for path in (repository, snapshot, snapshot / SINGLE, f"{repository}/"):
        assert_loaded(load(path), qwen3)
    with pytest.raises(ValueError, match=r"revision: expected None with a local folder"):
        load(repository, revision="v2")


def test_several_snapshots_without_a_branch_are_refused_and_listed(tmp_path, qwen3):
    repository = cache(tmp_path, qwen3, [COMMIT, OTHER], None)
    with pytest.raises(ValueError, match="2") as error:
        load(repository)
    assert str(repository / "snapshots" / COMMIT) in str(error.value)
    assert str(repository / "snapshots" / OTHER) in str(error.value)


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


def test_of_two_towers_one_is_chosen_by_prefix(tmp_path, tower):
    write(tmp_path, tower, "visual.")
    ema = {f"ema.visual.{name}": -tensor for name, tensor in tower.state.items()}
    save_file(ema | tower.composite("visual."), tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"got 2 under .*: choose one by prefix="):
        load(tmp_path)
    assert_loaded(load(tmp_path, prefix="visual"), tower)
    negative = load(tmp_path, prefix="ema.visual.").tower.state_dict()
    assert differing({name: -tensor for name, tensor in negative.items()}, tower.canonical) == []


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


def test_a_quantised_language_model_beside_a_plain_tower(tmp_path, qwen3):
    write(tmp_path, qwen3)
    text = {
        "model.language_model.layers.0.mlp.up_proj.weight": torch.ones(16, 16).to(torch.float8_e4m3fn),
        "model.language_model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
    }
    tensors = qwen3.composite() | text
    (tmp_path / SINGLE).unlink()
    save_sharded(tmp_path, tensors, {name: index % 3 for index, name in enumerate(tensors)})
    assert_loaded(load(tmp_path), qwen3)


def test_channels_last_convolutions(tmp_path, tower):
    write(tmp_path, tower)
    tensors = tower.composite("vision_tower.")
    name = "vision_tower.patch_embed.proj.weight"
    save_file(tensors | {name: tensors[name].movedim(1, -1).contiguous()}, tmp_path / SINGLE)
    assert_loaded(load(tmp_path), tower)


@pytest.mark.parametrize("option", ["subfolder", "config", "family", "prefix", "adapter"])
def test_the_demo_has_no_checkpoint_to_choose(option):
    with pytest.raises(ValueError, match=f"{option}: expected None with model='demo'"):
        load("demo", **{option: "x"})


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def adapted(request, tmp_path_factory):
    """A base, an adapter of its own folder, and the tower's tensors before and after peft's merge."""
    family, folder = request.param, tmp_path_factory.mktemp("adapted")
    model = base_model(family)
    model.save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text(json.dumps({"patch_size": visual(model).patch_size}))
    wrap(model, r=4, lora_alpha=8, target_modules=["attn.proj", "qkv", "q_proj"]).save_pretrained(folder / "adapter")
    before = {name: tensor.clone() for name, tensor in load(folder / "base").tower.state_dict().items()}
    after = merged_by_peft(model, folder / "adapter")
    assert len(differing(after, before)) == 2 * len(visual(model).blocks)
    return folder, before, after


def link(folder: Path, *sources: Path) -> Path:
    for source in sources:
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
    return folder


def test_an_adapter_is_merged_wherever_it_is(tmp_path, adapted):
    folder, before, after = adapted
    base, adapter = folder / "base", folder / "adapter"
    for path in (adapter, str(adapter), adapter / "adapter_model.safetensors"):
        assert differing(load(base, adapter=path).tower.state_dict(), after) == []
    both = link(tmp_path, base, adapter)
    for model in (both, both / SINGLE):
        with pytest.warns(UserWarning, match=r"the LoRA adapter beside the checkpoint is merged into it"):
            assert differing(load(model).tower.state_dict(), after) == []
    assert differing(load(both, adapter=False).tower.state_dict(), before) == []
    assert differing(load(both, adapter=both).tower.state_dict(), after) == []
    with pytest.warns(UserWarning, match=r"the adapter beside the checkpoint is not merged") as caught:
        load(both, adapter=adapter)
    assert caught[0].filename == __file__


def test_an_unmerged_adapter_in_the_checkpoint(tmp_path, adapted, request):
    folder, before, after = adapted
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["attn.proj", "qkv", "q_proj"]}
    wrapped = wrap(base_model(request.node.callspec.params["adapted"]), **config)
    save_file({name: tensor.contiguous() for name, tensor in wrapped.state_dict().items()}, tmp_path / SINGLE)
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).symlink_to(folder / "base" / name)
    with pytest.raises(ValueError, match="alpha is unknown"):
        load(tmp_path)
    assert differing(load(tmp_path, adapter=False).tower.state_dict(), before) == []
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter" / "adapter_config.json").read_bytes())
    assert differing(load(tmp_path).tower.state_dict(), after) == []
    with pytest.raises(ValueError, match=r"adapter: expected None or False, since the checkpoint"):
        load(tmp_path, adapter=folder / "adapter")


def test_a_folder_with_an_adapter_alone_names_its_base(adapted):
    folder, _, _ = adapted
    with pytest.raises(ValueError, match=r"this is an adapter.*adapter="):
        load(folder / "adapter")


def test_an_adapter_of_the_language_model_alone_is_said_to_change_nothing(tmp_path, adapted, request):
    folder, before, _ = adapted
    model = base_model(request.node.callspec.params["adapted"])
    wrap(model, r=2, target_modules=r".*language_model.*q_proj").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="nothing in the vision tower") as caught:
        encoder = load(folder / "base", adapter=tmp_path)
    assert caught[0].filename == __file__
    assert differing(encoder.tower.state_dict(), before) == []


@pytest.mark.parametrize("adapter", [True, 3])
def test_an_impossible_adapter_is_refused(adapted, adapter):
    with pytest.raises(TypeError, match="adapter: expected a path, a Hub repository, False or None"):
        load(adapted[0] / "base", adapter=adapter)


def test_a_merged_tower_is_not_saved_beside_its_adapter(tmp_path, adapted):
    folder, _, after = adapted
    encoder = load(folder / "base", adapter=folder / "adapter")
    encoder.save_pretrained(tmp_path / "merged")
    assert differing(load(tmp_path / "merged").tower.state_dict(), after) == []
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"contains adapter_config\.json"):
        encoder.save_pretrained(tmp_path)


def test_the_default_encoder_takes_the_same_options(tmp_path, adapted):
    folder, _, after = adapted
    file = tmp_path / "alone.safetensors"
    file.symlink_to(folder / "base" / SINGLE)
    (tmp_path / "preprocessor_config.json").symlink_to(folder / "base" / "preprocessor_config.json")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    config = json.loads((folder / "base" / "config.json").read_text())
    options = {"model": file, "device": "cpu", "config": config, "adapter": folder / "adapter"}
    qwenvit.encode(image, **options)
    encoder = default_encoder._current["encoder"]
    assert differing(encoder.tower.state_dict(), after) == []
    qwenvit.encode(image, **options | {"config": json.loads(json.dumps(config))})
    assert default_encoder._current["encoder"] is encoder
    qwenvit.encode(image, **options | {"adapter": False})
    assert default_encoder._current["encoder"] is not encoder
    assert differing(default_encoder._current["encoder"].tower.state_dict(), after) != []


def test_the_command_line_takes_the_same_options(tmp_path, adapted, capsys):
    folder, before, after = adapted
    link(tmp_path, folder / "base", folder / "adapter")
    fetch = ["fetch", str(tmp_path.parent), "--subfolder", tmp_path.name]
    for options, expected in (([], after), (["--no-adapter"], before), (["--adapter", str(folder / "adapter")], after)):
        output = tmp_path / f"out{len(options)}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert cli.main([*fetch, str(output), *options]) == 0
        assert differing(load(output).tower.state_dict(), expected) == []
    family = load(folder / "base").config.family
    alone = tmp_path / "elsewhere" / "x.safetensors"
    alone.parent.mkdir()
    alone.symlink_to(folder / "base" / SINGLE)
    (alone.parent / "preprocessor_config.json").symlink_to(folder / "base" / "preprocessor_config.json")
    config = str(folder / "base" / "config.json")
    assert cli.main(["info", str(alone), "--config", config, "--family", family, "--load"]) == 0
    assert "loaded" in capsys.readouterr().out
    assert cli.main(["info", str(alone), "--config", config, "--load", "--prefix", "nowhere"]) == 1
    assert "prefix: expected one with vision tensors" in capsys.readouterr().err


def test_a_whole_models_folder_is_not_overwritten(tmp_path, qwen3):
    write(tmp_path / "from", qwen3)
    encoder = load(tmp_path / "from")
    encoder.save_pretrained(tmp_path / "alone")
    encoder.save_pretrained(tmp_path / "alone")  # of a tower alone: replaced
    for number, content in enumerate([{"vlm_config": {"vision_config": config_of(qwen3)}}, {"model_type": "qwen3_vl"}]):
        write(tmp_path / str(number), qwen3, config=content)
        with pytest.raises(ValueError, match=r"contains the config\.json of a whole model"):
            encoder.save_pretrained(tmp_path / str(number))


@pytest.mark.parametrize("lost", ["config", "weights", "config's target", "weights, a pickle there"])
def test_half_an_adapter_beside_the_base_is_not_passed_over(tmp_path, adapted, lost):
    folder, before, _ = adapted
    both = link(tmp_path, folder / "base", folder / "adapter")
    file = both / ("adapter_config.json" if "config" in lost else "adapter_model.safetensors")
    file.unlink()
    if lost == "config's target":
        file.symlink_to(tmp_path / "nowhere")
    if "pickle" in lost:
        (both / "adapter_model.bin").write_bytes(b"")
    with pytest.raises((FileNotFoundError, ValueError), match="adapter"):
        load(both)
    assert differing(load(both, adapter=False).tower.state_dict(), before) == []


@pytest.mark.parametrize(("name", "told"), [("model.gguf", "GGUF"), ("pytorch_model.bin", "pickle")])
def test_another_format_without_a_config_is_named(tmp_path, name, told):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("{}")
    for model in (tmp_path, tmp_path / name):
        (tmp_path / name).write_bytes(b"GGUF\x03" + bytes(60) if "gguf" in name else b"PK\x03\x04" + bytes(60))
        with pytest.raises(ValueError, match=rf"only safetensors files are read.*{told}"):
            load(model)


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


def test_options_of_a_wrong_type_are_named(tmp_path, qwen3):
    write(tmp_path, qwen3)
    with pytest.raises(TypeError, match="prefix: expected a string or None, got 3"):
        load(tmp_path, prefix=3)
    with pytest.raises(ValueError, match=r"^family: expected one of .*got 'qwen9'"):
        load(tmp_path, family="qwen9")


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


def test_the_command_line_takes_no_checkpoint_options_with_the_demo(capsys):
    assert cli.main(["info", "demo", "--family", "qwen3_vl"]) == 1
    assert "family: expected None with model='demo'" in capsys.readouterr().err
