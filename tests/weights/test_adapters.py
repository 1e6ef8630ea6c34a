"""Adapters are merged as peft merges them, whatever peft can save."""

import copy
import re
import shutil
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwenvit.weights.adapters.adapter import ADAPTER_CONFIG, ADAPTER_FILE, read_adapter
from support.tiny_adapters import (
    FAMILIES,
    adaptable_modules,
    base_model,
    change,
    differing,
    merged_by_peft,
    merged_by_us,
    tower_tensors,
    wrap,
)
from support.tiny_models import visual
from support.tiny_towers import canonical_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOP_MODULES = {"patch_embed", "pos_embed", "blocks", "merger", "merger_list", "deepstack_merger_list"}
few_examples = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def is_tower_part(path):
    return "visual" in path.split(".")


@st.composite
def lora_configs(draw, family):
    """Draw what peft's LoraConfig can say, for modules of the tower and of the language model."""
    model = base_model(family)
    modules = adaptable_modules(model)
    tower = [path for path in modules if is_tower_part(path)]
    chosen = draw(st.lists(st.sampled_from(tower), min_size=1, max_size=5, unique=True))
    chosen += draw(st.lists(st.sampled_from(sorted(set(modules) - set(tower))), min_size=1, max_size=2, unique=True))
    rank, alpha = st.integers(1, 9), st.one_of(st.integers(1, 32), st.floats(0.25, 8.0))
    # Patterns as trainers write them: whole paths, ends of paths, and expressions; the first that matches counts.
    ends = st.sampled_from(chosen).flatmap(lambda path: st.sampled_from([path, f"^{path}", *_ends(path)]))
    patterns = st.one_of(ends, st.sampled_from([r".*visual.*proj", r"blocks\.[01]\..*", r"(qkv|proj|fc1)", "fc."]))
    saved = [None, ["merger"], ["norm1", "visual.merger"], ["blocks.1.norm2"], ["patch_embed", "norm2"]]
    biased = draw(st.booleans()) and not any(_has_no_bias(model, path) for path in chosen)
    return {
        "r": draw(rank),
        "lora_alpha": draw(alpha),
        "use_rslora": draw(st.booleans()),
        "target_modules": chosen,
        "rank_pattern": draw(st.dictionaries(patterns, rank, max_size=3).map(_sorted)),
        "alpha_pattern": draw(st.dictionaries(patterns, alpha, max_size=3).map(_sorted)),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "lora_bias": biased,
        "modules_to_save": draw(st.sampled_from(saved)),
        "fan_in_fan_out": draw(st.booleans()),  # peft ignores it for nn.Linear
    }


def _sorted(patterns):
    return dict(sorted(patterns.items()))  # peft sorts them when it saves them, and the first that matches counts


def _ends(path):
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _has_no_bias(model, path):
    module = model.get_submodule(path)
    return getattr(module, "bias", None) is None


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", FAMILIES)
@few_examples
@given(data=st.data())
def test_merging_is_pefts_bit_by_bit(family, data):
    config = data.draw(lora_configs(family))
    model = base_model(family, data.draw(st.sampled_from(DTYPES)))
    wrapped = wrap(model, **config)
    stored = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))  # by trainers that hold adapters in 16 bits
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(stored)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        expected = merged_by_peft(model, folder)
        adapter = read_adapter(Path(folder))
        actual = merged_by_us(adapter, family, model)
    assert differing(actual, expected) == []
    changed = {canonical_name(name) for name in adapter.tower_tensors}
    assert changed >= set(differing(actual, tower_tensors(model))) > set()


def lora(path, **config):
    """Return the config of an adapter of one tower module."""
    return {"target_modules": [path], "r": 2, "lora_alpha": 3, **config}


SEGMENTS = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=8).filter(
    lambda text: text not in TOP_MODULES | {"base_layer", "original_module", "modules_to_save"}
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter with every kind of tensor, and what peft makes of it."""
    folder, model = tmp_path_factory.mktemp("adapter"), base_model("qwen3_vl")
    targets = ["blocks.1.attn.qkv", "pos_embed", "patch_embed.proj", "merger.linear_fc1"]
    wrap(model, target_modules=targets, modules_to_save=["deepstack_merger_list.0"]).save_pretrained(folder)
    return folder, merged_by_peft(model, folder)


@settings(few_examples, max_examples=50)
@given(prefix=st.lists(SEGMENTS, max_size=4), name=st.one_of(st.none(), SEGMENTS))
def test_any_prefix_and_any_adapters_name(saved, prefix, name):
    folder, expected = saved
    start, inserted = "".join(f"{segment}." for segment in prefix), "" if name is None else f".{name}"

    def renamed(full):
        full = full.replace("base_model.model.model.visual.", start)
        return re.sub(r"(lora_[AB]|lora_embedding_[AB])(\.weight)?$", rf"\1{inserted}\2", full)

    with tempfile.TemporaryDirectory() as other:
        shutil.copy(folder / ADAPTER_CONFIG, other)
        tensors = load_file(folder / ADAPTER_FILE)
        save_file({renamed(full): tensor for full, tensor in tensors.items()}, Path(other) / ADAPTER_FILE)
        adapter = read_adapter(Path(other))
        assert differing(merged_by_us(adapter, "qwen3_vl", base_model("qwen3_vl")), expected) == []
    assert adapter.prefix == start


def test_the_whole_tower_saved_in_full(tmp_path):
    model = base_model("qwen2_5_vl", torch.bfloat16)
    wrap(model, target_modules=["q_proj"], modules_to_save=["visual"]).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    actual = merged_by_us(adapter, "qwen2_5_vl", model)
    assert differing(actual, merged_by_peft(model, tmp_path)) == []
    assert {canonical_name(name) for name in adapter.tower_tensors} == set(actual)


def test_the_saved_biases_count_and_not_their_copies(tmp_path):
    # With bias="all", peft writes the biases of modules_to_save three times.
    model = base_model("qwen2_vl")
    config = {"target_modules": ["qkv"], "modules_to_save": ["merger"], "bias": "all"}
    wrap(model, **config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    copies = [name for name in tensors if ".modules_to_save." in name or ".original_module." in name]
    assert len(copies) == 6
    other = {"base_model.model.model.visual.blocks.1.norm1.original_module.weight": torch.ones(32)}
    change(tmp_path, {name: tensors[name] + 1 for name in copies} | other)
    actual = merged_by_us(read_adapter(tmp_path), "qwen2_vl", model)
    assert differing(actual, merged_by_peft(model, tmp_path)) == []


def test_an_adapter_of_a_tower_alone(tmp_path):
    # A trainer that adapts the tower and not the whole model: the names have no `visual.`.
    tower = visual(base_model("qwen3_vl"))
    wrapped = wrap(tower, target_modules=["qkv", "linear_fc2"])
    wrapped.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(tower), tmp_path).merge_and_unload().state_dict()
    expected = {canonical_name(name): tensor for name, tensor in merged.items()}
    assert differing(merged_by_us(read_adapter(tmp_path), "qwen3_vl", base_model("qwen3_vl")), expected) == []


def test_an_adapter_of_other_parts_says_that_it_is_irrelevant(tmp_path):
    model = base_model("qwen2_5_vl")
    wrap(model, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.tower_tensors == ()
    with pytest.warns(UserWarning, match="nothing in the vision tower") as warned:
        adapter.warn_if_irrelevant()
    assert str(tmp_path) in str(warned[0].message)
    assert warned[0].filename == __file__
    assert differing(merged_by_us(adapter, "qwen2_5_vl", model), tower_tensors(model)) == []


def test_an_adapter_of_the_tower_does_not_warn(tmp_path, recwarn):
    wrap(base_model("qwen2_5_vl"), target_modules=["qkv"]).save_pretrained(tmp_path)
    recwarn.clear()
    read_adapter(tmp_path).warn_if_irrelevant()
    assert not recwarn.list


@pytest.mark.parametrize("path", ["merger.mlp.0", "patch_embed.proj"])
def test_autocast_around_it_changes_no_bit(tmp_path, path):
    model = base_model("qwen2_vl")
    wrap(model, **lora(f"visual.{path}")).save_pretrained(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        actual = merged_by_us(read_adapter(tmp_path), "qwen2_vl", model)
    assert differing(actual, merged_by_peft(model, tmp_path)) == []


def test_a_file_of_another_name(tmp_path):
    model = base_model("qwen2_vl")
    wrap(model, **lora("visual.blocks.1.attn.qkv")).save_pretrained(tmp_path)
    expected = merged_by_peft(model, tmp_path)
    (tmp_path / ADAPTER_FILE).rename(tmp_path / "checkpoint-100.safetensors")
    adapter = read_adapter(tmp_path / "checkpoint-100.safetensors")
    assert differing(merged_by_us(adapter, "qwen2_vl", model), expected) == []
