"""LoRA adapters beside a checkpoint, in it or elsewhere: merged as peft merges them, left out, or refused by name."""

import pytest
from safetensors.torch import save_file

from support.tiny_adapters import base_model, differing, wrap
from support.written_towers import SINGLE, link, load


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
