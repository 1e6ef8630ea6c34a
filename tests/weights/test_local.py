import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qwenvit.weights.local import CheckpointError, checkpoint_dtype, find_tensors, load_tensors, save_tensors
from qwenvit.weights.names import PREFIXES
from support.tiny_towers import Tower, build, save_sharded

SINGLE = "model.safetensors"


def load(path: Path, tower: Tower, **options: object) -> dict[str, torch.Tensor]:
    return load_tensors(find_tensors(path), tower.expected, family=tower.family, **options)


def assert_same(loaded: dict[str, torch.Tensor], tower: Tower) -> None:
    assert list(loaded) == list(tower.canonical)
    for name, tensor in tower.canonical.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("prefix", PREFIXES)
def test_single_file_under_every_prefix(tmp_path, tower, prefix):
    save_file(tower.composite(prefix), tmp_path / SINGLE)
    assert_same(load(tmp_path, tower), tower)
    assert_same(load(tmp_path / SINGLE, tower), tower)


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


def test_quantised_language_model_does_not_matter(tmp_path, qwen3):
    save_file(qwen3.composite() | {"model.layers.0.w": torch.ones(3, dtype=torch.int8)}, tmp_path / SINGLE)
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


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_truncated_file_is_refused_with_both_sizes(tmp_path, qwen3, kept):
    file = tmp_path / SINGLE
    save_file(qwen3.composite(), file)
    raw = file.read_bytes()
    file.write_bytes(raw[:kept])
    with pytest.raises(ValueError, match="truncated") as error:
        find_tensors(tmp_path)
    assert str(file) in str(error.value)
    assert str(len(raw[:kept])) in str(error.value)
    assert kept != -1 or str(len(raw)) in str(error.value)


@pytest.mark.parametrize("extra", [1, 8, 1000])
def test_trailing_bytes_are_refused_with_both_sizes(tmp_path, qwen3, extra):
    file = tmp_path / SINGLE
    save_file(qwen3.composite(), file)
    size = file.stat().st_size
    os.truncate(file, size + extra)
    with pytest.raises(SafetensorError):
        safe_open(file, framework="pt")
    with pytest.raises(ValueError, match=f"too long: expected {size} bytes by its header, got {size + extra}"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("spans", [[(1, 5), (5, 9)], [(0, 4), (5, 9)], [(0, 4), (3, 7)], [(0, 4), (0, 4)]])
def test_gaps_and_overlaps_of_tensors_are_refused(tmp_path, spans):
    header = {f"visual.{i}": {"dtype": "F32", "shape": [1], "data_offsets": span} for i, span in enumerate(spans)}
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(max(end for _, end in spans)))
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / SINGLE, framework="pt")
    with pytest.raises(ValueError, match=r"broken header: expected visual\.\d to start at byte"):
        find_tensors(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"not json at all.", b"[]", b'{"a":1}', b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'],
)
def test_broken_header_is_refused(tmp_path, text):
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="unreadable header"):
        find_tensors(tmp_path)


def test_a_file_of_another_format_is_refused(tmp_path):
    (tmp_path / SINGLE).write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ValueError, match=r"not a safetensors file.*give a header of"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {"visual.blocks.0.x": "../other.safetensors"}}'])
def test_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="weight_map"):
        find_tensors(tmp_path)


def test_an_index_that_lists_tensors_missing_from_a_shard_is_refused(tmp_path, qwen3):
    tensors = qwen3.composite()
    save_sharded(tmp_path, tensors, dict.fromkeys(tensors, 0))
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.visual.blocks.9.norm1.bias"] = "model-00001-of-00001.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"not in their shards: model.visual.blocks.9.norm1.bias in model-00001"):
        find_tensors(tmp_path)


def test_a_saved_tower_reads_back_here_and_in_transformers(tmp_path, tower):
    # Two slices of one tensor, like q, k and v of a fused weight, and a transposed tensor.
    fused = torch.stack([tower.canonical["blocks.0.norm1.weight"], tower.canonical["blocks.1.norm1.weight"]])
    tensors = tower.canonical | {"blocks.0.norm1.weight": fused[0], "blocks.1.norm1.weight": fused[1]}
    tensors["merger.fc1.weight"] = tensors["merger.fc1.weight"].t().contiguous().t()
    save_tensors(tmp_path / SINGLE, tensors, tower.family, {"made_by": "test"})
    assert_same(load(tmp_path, tower), tower)
    official = load_file(tmp_path / SINGLE)
    assert all(torch.equal(official[name], tensor) for name, tensor in tower.state.items())
    assert len(official) == len(tower.state)
    text = (tmp_path / SINGLE).read_bytes()[8:300]
    assert b'"format":"pt"' in text
    assert b'"made_by":"test"' in text
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]


def test_a_save_replaces_the_file_that_others_have_open(tmp_path, qwen3):
    file = tmp_path / SINGLE
    save_tensors(file, qwen3.canonical, "qwen3_vl")
    before = file.read_bytes()
    with file.open("rb") as reader:
        save_tensors(file, {name: -tensor for name, tensor in qwen3.canonical.items()}, "qwen3_vl")
        assert reader.read() == before
    assert_same({name: -tensor for name, tensor in load(tmp_path, qwen3).items()}, qwen3)
    assert [other.name for other in tmp_path.iterdir()] == [SINGLE]


def test_failed_save_leaves_the_old_file(tmp_path, qwen3):
    save_tensors(tmp_path / SINGLE, qwen3.canonical, "qwen3_vl")
    before = (tmp_path / SINGLE).read_bytes()
    with pytest.raises(ValueError, match="qwen2_vl"):
        save_tensors(tmp_path / SINGLE, qwen3.canonical, "qwen2_vl")
    assert (tmp_path / SINGLE).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE]
