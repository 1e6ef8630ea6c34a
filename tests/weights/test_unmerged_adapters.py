"""Checkpoints that were saved with an adapter in them: `base_layer`, `lora_A.default`."""

import copy
import shutil

import pytest
from safetensors.torch import load_file, save_file

from qwenvit.weights.adapters.adapter import ADAPTER_CONFIG, ADAPTER_FILE, adapter_in_checkpoint, split_unmerged
from qwenvit.weights.header import read_header
from support.tiny_adapters import base_model, differing, merged_by_peft, merged_by_us, wrap

FAMILY = "qwen3_vl"


@pytest.fixture
def unmerged(tmp_path):
    """Write a checkpoint with an adapter that is not merged; return what peft makes of it."""
    model = base_model(FAMILY)
    targets = ["blocks.0.attn.qkv", "pos_embed", "patch_embed.proj", "merger.linear_fc1"]
    config = {"target_modules": targets, "modules_to_save": ["deepstack_merger_list.0"], "bias": "all", "r": 3}
    wrapped = wrap(model, **config)
    wrapped.save_pretrained(tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / ADAPTER_CONFIG, tmp_path)
    save_file({name: tensor.clone() for name, tensor in wrapped.state_dict().items()}, tmp_path / "all.safetensors")
    # The base's biases in it are trained already.
    return merged_by_peft(model, tmp_path / "adapter")


def test_it_is_merged_as_peft_does(tmp_path, unmerged):
    file = tmp_path / "all.safetensors"
    entries, stored = read_header(file), load_file(file)
    base, of_adapter = split_unmerged(entries)
    assert len(base) + len(of_adapter) == len(entries)
    model = copy.deepcopy(base_model(FAMILY))
    model.load_state_dict({name.removeprefix("base_model.model."): stored[base[name]] for name in base})
    adapter = adapter_in_checkpoint(tmp_path, entries)
    assert differing(merged_by_us(adapter, FAMILY, model), unmerged) == []


@pytest.mark.usefixtures("unmerged")
def test_without_a_config(tmp_path):
    (tmp_path / ADAPTER_CONFIG).unlink()
    with pytest.raises(ValueError, match=f"no {ADAPTER_CONFIG} beside it, so that alpha is unknown"):
        adapter_in_checkpoint(tmp_path, read_header(tmp_path / "all.safetensors"))


@pytest.mark.usefixtures("unmerged")
def test_with_another_adapter_beside_it(tmp_path):
    shutil.copy(tmp_path / "adapter" / ADAPTER_FILE, tmp_path)
    with pytest.raises(ValueError, match="expected one adapter, got an adapter that is not merged"):
        adapter_in_checkpoint(tmp_path, read_header(tmp_path / "all.safetensors"))
