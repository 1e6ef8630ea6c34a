"""Adapters that cannot be merged as peft would are refused, by the name of what is wrong, before anything is read."""

import copy
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import save_file

from qwenvit.weights.adapters.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    read_adapter,
)
from support.tiny_adapters import (
    base_model,
    change,
    configure,
    merged_by_us,
    tower_tensors,
    wrap,
)

FAMILY = "qwen3_vl"
TOWER = "base_model.model.model.visual."
QKV = f"{TOWER}blocks.0.attn.qkv."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    targets = ["blocks.0.attn.qkv", "pos_embed", "patch_embed.proj", "layers.0.self_attn.q_proj"]
    config = {"target_modules": targets, "modules_to_save": ["merger"], "r": 3, "lora_alpha": 5}
    wrap(base_model(FAMILY), **config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    """The folder of an adapter, to be changed."""
    return shutil.copytree(saved, tmp_path / "adapter")


def refuse(folder, match, error=ValueError):
    """Check that the adapter is refused, in one line that names the folder, before any tensor is read."""
    tensors = tower_tensors(base_model(FAMILY))
    with pytest.raises(error, match=match) as caught:
        read_adapter(folder).check({name: tensor.shape for name, tensor in tensors.items()}, FAMILY)
    assert type(caught.value) is error
    assert str(folder) in str(caught.value)


KINDS = {
    "DoRA": (peft.LoraConfig(use_dora=True), "use_dora"),
    "LoHa": (peft.LoHaConfig(), "peft_type: expected LORA.* got 'LOHA'"),
    "LoKr": (peft.LoKrConfig(), "got 'LOKR'"),
    "IA3": (peft.IA3Config(feedforward_modules=[]), "got 'IA3'"),
    "OFT": (peft.OFTConfig(oft_block_size=0, r=4), "got 'OFT'"),
    "VeRA": (peft.VeraConfig(r=2), "got 'VERA'"),
    "AdaLoRA": (peft.AdaLoraConfig(total_step=10), "got 'ADALORA'"),
    "HRA": (peft.HRAConfig(), "got 'HRA'"),
}


class TestOtherKinds:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("where", ["tower", "language model"])
    def test_by_name_if_it_touches_the_tower(self, tmp_path, kind, where):
        config, match = KINDS[kind]
        config = copy.deepcopy(config)
        config.target_modules = ["blocks.1.attn.qkv"] if where == "tower" else ["layers.0.self_attn.q_proj"]
        peft.get_peft_model(copy.deepcopy(base_model(FAMILY)), config).save_pretrained(tmp_path)
        if where == "tower":
            refuse(tmp_path, match)
        else:
            assert read_adapter(tmp_path).tower_tensors == ()

    def test_prompts_are_irrelevant(self, tmp_path):
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
        save_file({"prompt_embeddings": torch.zeros(4, 8)}, tmp_path / ADAPTER_FILE)
        with pytest.warns(UserWarning, match="nothing in the vision tower"):
            read_adapter(tmp_path).warn_if_irrelevant()

    def test_a_magnitude_vector_without_its_setting(self, adapter):
        change(adapter, {f"{QKV}lora_magnitude_vector": torch.ones(96)})
        refuse(adapter, r"qkv.lora_magnitude_vector: .*\(DoRA\)")

    def test_trained_tokens_of_positions(self, adapter):
        change(adapter, {f"{TOWER}pos_embed.token_adapter.trainable_tokens_delta": torch.ones(2, 32)})
        refuse(adapter, "pos_embed.token_adapter.trainable_tokens_delta: expected LoRA's weights")

    def test_parameters_that_are_no_modules(self, tmp_path):
        wrap(base_model(FAMILY), target_parameters=["attn.proj.weight"]).save_pretrained(tmp_path)
        refuse(tmp_path, "target_parameters: .*attn.proj.weight")

    def test_parameters_of_the_language_model(self, adapter):
        configure(adapter, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
        assert read_adapter(adapter).tower_tensors


class TestTensors:
    @pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight"])
    def test_one_of_a_pair(self, adapter, part):
        change(adapter, without=[QKV + part])
        refuse(adapter, rf"blocks.0.attn.qkv: {part} is missing")

    @pytest.mark.parametrize("part", ["lora_embedding_A", "lora_embedding_B"])
    def test_one_of_a_pair_of_an_embedding(self, adapter, part):
        change(adapter, without=[f"{TOWER}pos_embed.{part}"])
        refuse(adapter, rf"pos_embed: {part} is missing")

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("blocks.0.attn.qkv.lora_A.weight", (3, 31)),
            ("blocks.0.attn.qkv.lora_A.weight", (2, 32)),
            ("blocks.0.attn.qkv.lora_A.weight", (0,)),
            ("blocks.0.attn.qkv.lora_B.weight", (95, 3)),
            ("blocks.0.attn.qkv.lora_B.weight", (3, 96)),
            ("patch_embed.proj.lora_A.weight", (3, 96)),
            ("patch_embed.proj.lora_B.weight", (32, 3)),
            ("pos_embed.lora_embedding_A", (64, 3)),
            ("merger.linear_fc1.weight", (128, 127)),
        ],
    )
    def test_a_shape_that_does_not_fit(self, adapter, name, shape):
        change(adapter, {TOWER + name: torch.ones(shape)})
        module = name.replace(".weight", "").partition(".lora")[0]
        refuse(adapter, rf"{module}: .*expected .*got {str(shape)[:-1]}".replace("(", r"\("))

    def test_ranks_that_differ_from_the_config(self, adapter):
        configure(adapter, rank_pattern={"qkv": 4})
        refuse(adapter, r"blocks.0.attn.qkv: lora_A.weight: expected \(4, 32\) \(rank 4 in the config\), got \(3, 32\)")

    @pytest.mark.parametrize(
        "name",
        [
            "blocks.2.attn.qkv.lora_A.weight",  # the tower has two blocks
            "blocks.0.attn.q.lora_A.weight",
            "blocks.00.attn.qkv.lora_A.weight",
            "blocks.0.mlp.gate_proj.lora_A.weight",
            "merger.mlp.0.lora_A.weight",
        ],
    )
    def test_a_module_that_the_tower_lacks(self, adapter, name):
        change(adapter, {TOWER + name: torch.ones(3, 32)})
        refuse(adapter, f"{name.partition('.lora')[0]}: the qwen3_vl tower of .* tensors has no such module")

    @pytest.mark.parametrize(
        "name",
        ["blocks.0.attn._orig_mod.qkv.lora_A.weight", "blocks.0.attn.lora_A.weight", "merger.lora_A.weight", "x"],
    )
    def test_a_name_under_the_tower_that_no_tower_has(self, adapter, name):
        change(adapter, {TOWER + name: torch.ones(3, 32)})
        refuse(adapter, f"visual.{name}: expected a module of a vision tower")

    def test_lora_on_a_norm(self, adapter):
        norm = f"{TOWER}blocks.0.norm1."
        change(adapter, {f"{norm}lora_A.weight": torch.ones(3, 32), f"{norm}lora_B.weight": torch.ones(32, 3)})
        refuse(adapter, "blocks.0.norm1: lora_A.weight: expected none for this module")

    def test_a_linear_layers_lora_on_an_embedding(self, adapter):
        name = f"{TOWER}pos_embed."
        change(adapter, {f"{name}lora_A.weight": torch.ones(3, 32), f"{name}lora_B.weight": torch.ones(64, 3)})
        refuse(adapter, "pos_embed: lora_[AB].weight: expected none for this module")

    def test_an_embeddings_lora_on_a_linear_layer(self, adapter):
        change(adapter, {f"{QKV}lora_embedding_A": torch.ones(3, 32), f"{QKV}lora_embedding_B": torch.ones(96, 3)})
        refuse(adapter, "blocks.0.attn.qkv: lora_.*: expected none for this module")

    def test_a_bias_of_b_without_its_setting(self, adapter):
        change(adapter, {f"{QKV}lora_B.bias": torch.ones(96)})
        refuse(adapter, "blocks.0.attn.qkv: lora_B.bias: expected none")

    def test_the_setting_without_a_bias_of_b(self, adapter):
        configure(adapter, lora_bias=True)
        refuse(adapter, "blocks.0.attn.qkv: lora_B.bias is missing")

    def test_a_bias_of_b_where_the_base_has_none(self, tmp_path):
        config = {"target_modules": ["patch_embed.proj"], "lora_bias": True, "r": 2}
        wrap(base_model("qwen2_vl"), **config).save_pretrained(tmp_path)
        shapes = {name: tensor.shape for name, tensor in tower_tensors(base_model("qwen2_vl")).items()}
        with pytest.raises(ValueError, match=r"patch_embed.proj: lora_B.bias: expected none for this module"):
            read_adapter(tmp_path).check(shapes, "qwen2_vl")

    def test_saved_modules_that_are_not_there(self, adapter):
        change(adapter, without=[f"{TOWER}merger.linear_fc2.bias"])
        refuse(adapter, "merger.linear_fc2.bias: missing, though modules_to_save lists 'merger'")

    @pytest.mark.parametrize("name", ["merger", "visual", "model.visual.blocks.0", "pos_embed"])
    def test_saved_modules_of_which_nothing_is_there(self, tmp_path, name):
        wrap(base_model(FAMILY), target_modules=["q_proj"]).save_pretrained(tmp_path)
        configure(tmp_path, modules_to_save=["lm_head", name])
        refuse(tmp_path, f"expected weights of '{name}', which modules_to_save in .* lists, got none")

    def test_another_familys_adapter(self, tmp_path):
        wrap(base_model("qwen2_5_vl"), target_modules=["gate_proj", "mlp.0"]).save_pretrained(tmp_path)
        refuse(tmp_path, "blocks.0.mlp.gate_proj: the qwen3_vl tower of .* tensors has no such module")

    def test_many_problems_are_listed_and_counted(self, tmp_path):
        wrap(base_model("qwen2_5_vl"), target_modules=r".*visual.*mlp\..*_proj").save_pretrained(tmp_path)
        configure(tmp_path, modules_to_save=["blocks.0", "merger"])
        refuse(tmp_path, r"… and \d+ more")

    def test_quantised_weights(self, adapter):
        change(adapter, {f"{QKV}lora_A.weight": torch.ones(3, 32, dtype=torch.int8)})
        refuse(adapter, "lora_A.weight: expected BF16, F16, F32, F64, got I8")

    def test_two_towers(self, adapter):
        change(adapter, {"a.visual.blocks.0.attn.qkv.lora_A.weight": torch.ones(3, 32)})
        refuse(
            adapter, "expected one vision tower in the adapter, got 'a.visual.' and 'base_model.model.model.visual.'"
        )

    @pytest.mark.parametrize("other", [f"{QKV}lora_A.default.weight", f"{TOWER}merger.base_layer.linear_fc1.weight"])
    def test_two_tensors_for_one_weight(self, adapter, other):
        change(adapter, {other: torch.ones(3, 32)})
        refuse(adapter, f"expected one tensor for each weight, got .* and {other}|got {other} and ")

    def test_more_modules_than_any_tower_has(self, adapter):
        change(adapter, {f"{TOWER}blocks.{index}.norm1.bias": torch.ones(1) for index in range(2001)})
        refuse(adapter, "expected at most 2000 modules of a vision tower, got 20")

    def test_two_adapters(self, adapter):
        change(
            adapter, {f"{QKV}lora_A.first.weight": torch.ones(3, 32), f"{QKV}lora_A.second.weight": torch.ones(3, 32)}
        )
        refuse(adapter, "expected one adapter, got first and second")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
    def test_weights_that_are_not_finite(self, adapter, value):
        change(adapter, {f"{QKV}lora_B.weight": torch.full((96, 3), value)})
        model = base_model(FAMILY)
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight is not finite in torch.float32"):
            merged_by_us(read_adapter(adapter), FAMILY, model)

    def test_a_sum_beyond_fp16(self, adapter):
        configure(adapter, lora_alpha=1e6)
        model = base_model(FAMILY, torch.float16)
        with pytest.raises(ValueError, match=r"is not finite in torch.float16 once the adapter is merged"):
            merged_by_us(read_adapter(adapter), FAMILY, model)

    def test_a_file_that_changes_after_the_check(self, adapter):
        found = read_adapter(adapter)
        change(adapter, {f"{QKV}lora_A.weight": torch.ones(1, 32)})
        with pytest.raises(ValueError, match="changed while it was read"):
            merged_by_us(found, FAMILY, base_model(FAMILY))
