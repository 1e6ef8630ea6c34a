"""Setup shared by the tests of `from_pretrained`: tiny towers of every family, and an adapter beside its base."""

import json

import pytest

from support.tiny_adapters import base_model, differing, merged_by_peft, wrap
from support.tiny_models import visual
from support.tiny_towers import FAMILIES, Tower, build
from support.written_towers import load


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
