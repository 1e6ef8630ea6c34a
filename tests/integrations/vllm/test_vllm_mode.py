"""Which parts of a model the plugin replaces, from plain facts."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qwenvit.integrations.vllm import mode
from qwenvit.integrations.vllm.mode import Setup, choose_mode
from qwenvit.integrations.vllm.options import Options
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.towers import narrow

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = narrow("qwen3_vl")
OBSTACLES = {
    "tensor_parallel_size=2": Setup(tensor_parallel_size=2),
    "pipeline_parallel_size=3": Setup(pipeline_parallel_size=3),
    "quantised .blocks.0.attn.qkv: Fp8LinearMethod.": Setup(quantized="blocks.0.attn.qkv: Fp8LinearMethod"),
    "mm_encoder_attn_dtype='fp8'": Setup(fp8_attention=True),
    "enable_tower_connector_lora": Setup(tower_lora=True),
    "offloaded to the CPU": Setup(offloaded=True),
    "load_format='sharded_state'": Setup(load_format="sharded_state"),
}


@pytest.fixture(autouse=True)
def attention(monkeypatch):
    """The calls of `use_attention`; it raises what `calls.error` says."""

    class Calls(list):
        error = None

        def __call__(self, *args):
            if self.error:
                raise ValueError(self.error)
            self.append(args)

    calls = Calls()
    monkeypatch.setattr(mode, "use_attention", calls)
    return calls


def choose(options=None, setup=None, device=CPU):
    default = Options(impl="reference" if device == CPU else "auto")
    return choose_mode(options or default, setup or Setup(), nn.Module(), CONFIG.to_hf(), device)


def test_on_a_cpu_only_what_is_asked_for(attention):
    """vLLM's own tower has packed weights there, and our reference tower is plain torch."""
    choice = choose(Options())
    assert (choice.mode, choice.make_tower, attention) == ("off", None, [])
    assert "on a CPU" in str(choice)
    assert choose(Options(pixels=True)).mode == "off"
    assert choose(Options(tower="attention")).mode == "attention"
    assert choose(Options(tower="tower")).impl == "reference"


def test_on_a_cpu_the_reference_tower(attention):
    choice = choose()
    assert (choice.mode, choice.impl, attention) == ("tower", "reference", [])
    tower = choice.make_tower()
    assert isinstance(tower, ReferenceTower)
    assert tower.config == CONFIG


def test_on_a_gpu_that_can_the_fast_tower(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    choice = choose(device=GPU)
    assert (choice.mode, choice.impl) == ("tower", "triton")
    tower = choice.make_tower()
    assert isinstance(tower, FastTower)
    assert tower.impl == "triton"
    reference = choose(Options(impl="reference"), device=GPU)
    assert isinstance(reference.make_tower(), ReferenceTower)


def test_on_a_gpu_that_cannot_no_reference_tower_instead(monkeypatch, attention):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    attention.error = "visual: expected a newer GPU"
    choice = choose(device=GPU)
    assert choice.mode == "off"
    assert "compute capability (7, 5)" in choice.reason
    assert "visual: expected a newer GPU" in choice.reason
    assert "off, with vLLM's own tower, because " in str(choice)


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"qwenvit\.tower: .*cpu is no CUDA device"):
        choose(Options(tower="tower", impl="triton"))


@pytest.mark.parametrize("reason", OBSTACLES)
def test_each_obstacle_makes_it_attention_mode_with_its_reason(reason, attention):
    choice = choose(setup=OBSTACLES[reason])
    assert choice.mode == "attention"
    assert len(attention) == 1
    with pytest.raises(ValueError, match=reason):
        choose(Options(tower="tower"), OBSTACLES[reason])
    with pytest.raises(ValueError, match=reason):
        raise ValueError(str(choice))


def test_encoder_data_parallelism_is_no_obstacle():
    assert choose(setup=Setup(tensor_parallel_size=8, tower_parallel="data")).mode == "tower"


def test_attention_that_is_wished_for(attention):
    assert choose(Options(tower="attention", impl="reference")).mode == "attention"
    assert attention[0][2] == "reference"
    attention.error = "visual: expected other heads"
    with pytest.raises(ValueError, match=r"qwenvit\.tower: 'attention' cannot be used: visual: expected other heads"):
        choose(Options(tower="attention"))


def test_what_attention_cannot_live_with_is_off_with_its_reason(attention):
    wish = Options(tower="attention", impl="reference")
    assert choose(wish, Setup(encoder_graphs=True)).mode == "attention"  # there are none on a CPU
    with pytest.raises(ValueError, match="cudagraph_mm_encoder cannot capture"):
        choose(wish, Setup(encoder_graphs=True), GPU)
    assert choose(Options(tower="attention"), Setup(encoder_graphs=True, compiled=True), GPU).mode == "attention"
    unknown = Setup(compiled=True, takes_keys=False, pipeline_parallel_size=2)
    choice = choose(setup=unknown)
    assert choice.mode == "off"
    assert "compile_mm_encoder may take code" in choice.reason
    assert len(attention) == 2


class Layer(nn.Linear):
    def __init__(self, method):
        super().__init__(2, 2)
        self.quant_method = type(method, (), {})()


def test_quantised_and_offloaded_layers_are_found_in_vllm_tower():
    plain = nn.Sequential(Layer("UnquantizedLinearMethod"), nn.LayerNorm(2))
    assert mode._quantized_layer(plain) is None
    assert mode._quantized_layer(nn.Sequential(plain, Layer("Fp8LinearMethod"))) == "1: Fp8LinearMethod"
    assert not mode._is_offloaded(plain)
    plain[0].weight._vllm_is_uva_offloaded = True
    assert mode._is_offloaded(plain)
    assert mode._is_offloaded(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


def test_a_config_that_is_no_towers_leaves_vllm_own(attention):
    broken = CONFIG.to_hf() | {"num_heads": 7}
    choice = choose_mode(Options(impl="reference"), Setup(), nn.Module(), broken, CPU)
    assert choice.mode == "off"
    assert "num_heads" in choice.reason
    assert attention == []


def test_a_setup_has_no_obstacle_unless_it_has_one():
    assert Setup().tower_obstacle() is None
    assert replace(Setup(), pipeline_parallel_size=2).tower_obstacle()
