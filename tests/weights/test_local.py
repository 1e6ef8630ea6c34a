import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwenvit.weights.local import CheckpointError, checkpoint_dtype, find_tensors, load_tensors
from support.tiny_towers import Tower, build, save_sharded

SINGLE = "model.safetensors"


def load(path: Path, tower: Tower, **options: object) -> dict[str, torch.Tensor]:
    return load_tensors(find_tensors(path), tower.expected, family=tower.family, **options)


def assert_same(loaded: dict[str, torch.Tensor], tower: Tower) -> None:
    assert list(loaded) == list(tower.canonical)
    for name, tensor in tower.canonical.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    "prefix", ["model.visual.", "visual.", "thinker.visual.", "", "vlm.visual.", "vision_tower.", "module.visual."]
)
def test_a_single_file_loads_under_any_prefix(tmp_path, tower, prefix):
    save_file(tower.composite(prefix), tmp_path / SINGLE)
    assert_same(load(tmp_path, tower), tower)
    assert_same(load(tmp_path / SINGLE, tower), tower)


def test_of_two_towers_the_chosen_one_is_loaded(tmp_path, tower):
    other = {f"ema.visual.{name}": -tensor for name, tensor in tower.state.items()}
    save_file(tower.composite("visual.") | other, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected one vision tower, got 2 under "):
        find_tensors(tmp_path)
    for prefix, sign in (("visual.", 1), ("ema.visual", -1)):
        loaded = load_tensors(find_tensors(tmp_path, prefix), tower.expected, family=tower.family)
        assert_same({name: sign * tensor for name, tensor in loaded.items()}, tower)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_file_with_a_complete_tower_is_preferred_to_an_earlier_incomplete_one(tmp_path, qwen3, broken):
    files = ["model_visual.safetensors", SINGLE]
    incomplete = {name: tensor for name, tensor in qwen3.composite().items() if "merger" not in name}
    for index, file in enumerate(files):
        save_file(qwen3.composite() if index == broken else incomplete, tmp_path / file)
    if broken == 2:
        whole = qwen3.composite()
        save_sharded(tmp_path, whole, dict.fromkeys(whole, 0))
    assert_same(load(tmp_path, qwen3), qwen3)


def test_the_index_of_a_sharded_checkpoint_may_be_given_itself(tmp_path, qwen3):
    whole = qwen3.composite("a.b.")
    save_sharded(tmp_path, whole, {name: number % 3 for number, name in enumerate(whole)})
    assert_same(load(tmp_path / "model.safetensors.index.json", qwen3), qwen3)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_patch_embedding_with_channels_last_is_turned(tmp_path, tower, dtype):
    tensors = tower.composite()
    name = tower.prefix + "patch_embed.proj.weight"
    tensors[name] = tensors[name].permute(0, 2, 3, 4, 1).contiguous()  # as MLX stores convolutions
    assert tensors[name].shape == (16, 2, 4, 4, 3)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "mlx"})
    loaded = load(tmp_path, tower, dtype=dtype)
    assert_same(loaded, tower)
    assert all(tensor.is_contiguous() for tensor in loaded.values())


@pytest.mark.parametrize("layout", [(1, 2, 3, 4, 0), (2, 3, 4, 1, 0), (0, 2, 1, 3, 4)])
def test_a_patch_embedding_of_an_unknown_layout_is_refused(tmp_path, tower, layout):
    tensors, name = tower.composite(), tower.prefix + "patch_embed.proj.weight"
    flat = tensors | {name: tensors[name].flatten(1)}
    for stored in (tensors | {name: tensors[name].permute(layout).contiguous()}, flat):
        save_file(stored, tmp_path / SINGLE)
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is read as \[out, channels") as error:
            load(tmp_path, tower)
        assert error.value.mismatched == [(name, (16, 3, 2, 4, 4), tuple(stored[name].shape))]


def test_the_base_below_an_unmerged_adapter_is_read_and_the_adapter_refused(tmp_path, tower):
    adapted = "blocks.1.attn.proj"
    tensors = {name.replace(adapted, f"{adapted}.base_layer"): t for name, t in tower.composite().items()}
    assert any("base_layer" in name for name in tensors)
    save_file(tensors, tmp_path / SINGLE)
    assert_same(load(tmp_path, tower), tower)
    lora = {f"{tower.prefix}{adapted}.lora_{m}.default.weight": torch.ones(2, 2) for m in "AB"}
    save_file(tensors | lora, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, tower)
    assert set(error.value.unexpected) == set(lora)
    other = {f"{tower.prefix}{adapted}.ia3_l.default": torch.ones(2, 1)}
    save_file(tensors | other, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"of another kind than LoRA[\s\S]*merge_and_unload") as error:
        load(tmp_path, tower)
    assert set(error.value.unexpected) == set(other)


def test_tower_that_transformers_saved_alone(tmp_path, tower):
    tower.model.save_pretrained(tmp_path)
    assert_same(load(tmp_path, tower), tower)


def test_a_separate_vision_file_is_preferred(tmp_path, tower):
    save_file(
        {"visual." + name: tensor for name, tensor in tower.state.items()},
        tmp_path / "model_visual.safetensors",
    )
    save_file({name: torch.zeros_like(t) for name, t in tower.composite().items()}, tmp_path / SINGLE)
    assert_same(load(tmp_path, tower), tower)


@pytest.mark.parametrize("vision_in", ["single", "shards"])
def test_the_layout_with_vision_tensors_is_used(tmp_path, qwen3, vision_in):
    whole, text = qwen3.composite(), {"lm_head.weight": torch.ones(2)}
    save_file(whole if vision_in == "single" else text, tmp_path / SINGLE)
    sharded = text if vision_in == "single" else whole
    save_sharded(tmp_path, sharded, dict.fromkeys(sharded, 0))
    assert_same(load(tmp_path, qwen3), qwen3)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_into_shards_without_the_unneeded_ones(tmp_path_factory, qwen3, data):
    directory = tmp_path_factory.mktemp("shards")
    tensors = qwen3.composite()
    shard_of = {name: data.draw(st.integers(0, 4), label=name) for name in tensors}
    weight_map = save_sharded(directory, tensors, shard_of)
    needed = {file for name, file in weight_map.items() if name.startswith(qwen3.prefix)}
    for file in set(weight_map.values()) - needed:
        (directory / file).unlink()
    assert_same(load(directory, qwen3), qwen3)
    absent = sorted(needed)[0]
    (directory / absent).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(absent)):
        find_tensors(directory)


def test_entries_give_the_byte_range_of_each_tensor(tmp_path, qwen3):
    save_file(qwen3.composite(), tmp_path / SINGLE)
    raw = (tmp_path / SINGLE).read_bytes()
    entries = find_tensors(tmp_path)
    assert set(entries) == {qwen3.prefix + name for name in qwen3.state}
    for name, entry in entries.items():
        tensor = qwen3.state[name.removeprefix(qwen3.prefix)]
        assert (entry.file, entry.dtype, entry.shape) == (tmp_path / SINGLE, "BF16", tuple(tensor.shape))
        assert raw[entry.start : entry.end] == tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_loaded_tensors_have_the_dtype_and_own_their_memory(tmp_path, qwen3, dtype):
    save_file(qwen3.composite(), tmp_path / SINGLE)
    loaded = load(tmp_path, qwen3, dtype=dtype)
    # Overwriting the file in place would change a tensor that is a view of the mapped file.
    with (tmp_path / SINGLE).open("r+b") as stream:
        stream.write(b"\xff" * (tmp_path / SINGLE).stat().st_size)
    for name, tensor in qwen3.canonical.items():
        assert torch.equal(loaded[name], tensor.to(dtype or tensor.dtype))
        assert loaded[name].untyped_storage().nbytes() == loaded[name].nbytes


def test_checkpoint_dtype_is_the_dtype_of_most_bytes(tmp_path, qwen3):
    mixed = {n: t.float() if "norm" in n or "bias" in n else t for n, t in qwen3.state.items()}
    save_file(mixed | {"lm_head.weight": torch.ones(10**6)}, tmp_path / SINGLE)
    assert sum(t.dtype == torch.float32 for t in mixed.values()) > len(mixed) / 2
    assert checkpoint_dtype(find_tensors(tmp_path)) == torch.bfloat16
    loaded = load(tmp_path, qwen3)
    assert loaded["merger.norm.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="got none"):
        checkpoint_dtype({})


def test_missing_unexpected_and_mismatched_tensors_are_listed_together(tmp_path, tower):
    tensors = tower.composite()
    lost, extra, wrong = (tower.prefix + name for name in ("blocks.1.norm2.weight", "blocks.7.what", "merger.x.bias"))
    first = tower.prefix + "patch_embed.proj.weight"
    del tensors[lost]
    tensors |= {extra: torch.ones(2), wrong: torch.ones(2), first: torch.ones(16, 3, 2, 5, 4)}
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, tower)
    assert (error.value.missing, sorted(error.value.unexpected)) == ([lost], sorted([extra, wrong]))
    assert error.value.mismatched == [(first, (16, 3, 2, 4, 4), (16, 3, 2, 5, 4))]
    for part in (lost, extra, wrong, f"{first}: expected (16, 3, 2, 4, 4), got (16, 3, 2, 5, 4)"):
        assert part in str(error.value)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched", "unreadable"])
def test_a_single_fault_is_refused(tmp_path, tower, fault):
    name = tower.prefix + ("merger.surplus" if fault == "unexpected" else "blocks.1.attn.proj.bias")
    tensors = tower.composite()
    if fault == "missing":
        del tensors[name]
    elif fault == "unreadable":
        tensors[name] = tensors[name].to(torch.int32)
    else:
        tensors[name] = torch.ones(2, 3, 4)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=re.escape(name)) as error:
        load(tmp_path, tower)
    found = {kind: getattr(error.value, kind) for kind in ("missing", "unexpected", "mismatched", "unreadable")}
    assert [kind for kind, faults in found.items() if faults] == [fault]


def test_long_lists_are_shortened_in_the_message_and_complete_in_the_attributes(tmp_path, qwen3):
    kept = {name: tensor for name, tensor in qwen3.composite().items() if ".blocks." not in name}
    save_file(kept, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="… and 12 more") as error:
        load(tmp_path, qwen3)
    assert error.value.missing == [qwen3.prefix + name for name in qwen3.state if name.startswith("blocks.")]
    assert len(error.value.missing) == 24


def test_a_checkpoint_of_another_family_is_recognised(tmp_path, tower):
    other = "qwen2_vl" if tower.family != "qwen2_vl" else "qwen3_omni"
    save_file(tower.composite(), tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=rf"\({other}\): these look like tensors of .*{tower.family}"):
        load_tensors(find_tensors(tmp_path), build(other).expected, family=other)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32, torch.uint8])
def test_quantised_tower_is_refused(tmp_path, qwen3, dtype):
    name = qwen3.prefix + "blocks.0.attn.qkv.weight"
    tensors = qwen3.composite()
    tensors |= {name: torch.zeros(tensors[name].shape).to(dtype), name + "_scale_inv": torch.ones(1)}
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="Quantised towers are not supported") as error:
        load(tmp_path, qwen3)
    assert [found for found, _ in error.value.unreadable] == [name]
    assert error.value.unexpected == [name + "_scale_inv"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_language_model_does_not_matter(tmp_path, qwen3, dtype):
    text = {
        "model.language_model.layers.0.mlp.up_proj.weight": torch.ones(3).to(dtype),
        "model.language_model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1),
    }
    save_file(qwen3.composite() | text, tmp_path / SINGLE)
    assert_same(load(tmp_path, qwen3), qwen3)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tower.pt", "tower.pth", "last.ckpt"])
def test_pickles_are_refused_with_advice(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=re.escape(name) + ".*convert it"):
            find_tensors(path)


def test_a_folder_without_a_checkpoint_is_refused_with_the_expected_names(tmp_path):
    (tmp_path / "odd.safetensors").touch()
    with pytest.raises(FileNotFoundError) as error:
        find_tensors(tmp_path)
    for part in ("model_visual.safetensors", SINGLE, "model.safetensors.index.json", "odd.safetensors"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_tensors(tmp_path / "nowhere")


def test_an_index_that_lists_tensors_missing_from_a_shard_is_refused(tmp_path, qwen3):
    tensors = qwen3.composite()
    save_sharded(tmp_path, tensors, dict.fromkeys(tensors, 0))
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.visual.blocks.9.norm1.bias"] = "model-00001-of-00001.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"not in their shards: model.visual.blocks.9.norm1.bias in model-00001"):
        find_tensors(tmp_path)
