"""What use_tower refuses: unfit models, which it leaves unchanged, and in a call later changes and odd arguments."""

import copy
import functools
import inspect
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import vision_utils

from qwenvit.integrations.transformers import tower as integration
from qwenvit.integrations.transformers import use_tower
from support.pinned import needs_pinned_transformers
from support.tiny_models import inputs_for, visual
from support.use_tower import BATCHES, log_probabilities


class AdaptedLinear(nn.Module):
    """Adapts a layer as PEFT's LoRA does."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2)
        self.lora_B = nn.Linear(2, base_layer.out_features)


class QuantisedLinear(nn.Linear):
    """A subclass of nn.Linear, as bitsandbytes' layers are."""


class QuantisedParameter(nn.Parameter):
    """A subclass of Parameter, as bitsandbytes' parameters are."""


def adapt(tower):
    tower.blocks[1].attn.proj = AdaptedLinear(tower.blocks[1].attn.proj)


def quantise_layer(tower):
    tower.blocks[1].mlp.down_proj.__class__ = QuantisedLinear


def quantise_parameter(tower):
    layer = tower.blocks[1].mlp.down_proj
    layer.weight = QuantisedParameter(layer.weight.detach())


def quantise_with_torch(tower):
    torch.ao.quantization.quantize_dynamic(tower, {nn.Linear}, dtype=torch.qint8, inplace=True)


def distribute(tower):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    layer = tower.blocks[0].mlp.up_proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
    dist.destroy_process_group()


def offload(tower):
    tower.blocks[2].to("meta")


def hook_by_accelerate(tower):
    tower.blocks[1]._hf_hook = object()


def hook_forward(tower):
    tower.blocks[1].register_forward_hook(hook_forward)


def hook_before(tower):
    tower.patch_embed.register_forward_pre_hook(hook_before)


def hook_backward(tower):
    tower.merger.register_full_backward_hook(hook_backward)


def mix_dtypes(tower):
    tower.merger.to(torch.bfloat16)


def convert_to_fp64(tower):
    tower.double()


def add_a_parameter(tower):
    tower.scale = nn.Parameter(torch.ones(1))


def prune(tower):
    del tower.blocks[2]


def replace_forward(tower):
    tower.forward = functools.partial(type(tower).forward, tower)


def replace_inner_forward(tower):
    norm = tower.blocks[1].norm1
    norm.forward = functools.partial(type(norm).forward, norm)


REFUSALS = {
    adapt: "neither quantised nor adapted .LoRA., got the vision tower's blocks.1.attn.proj of class .*AdaptedLinear",
    quantise_layer: "neither quantised nor adapted .LoRA., got the vision tower's blocks.1.mlp.down_proj of class .*Q",
    quantise_parameter: "nor quantised, got blocks.1.mlp.down_proj.weight of class QuantisedParameter",
    quantise_with_torch: "neither quantised nor adapted .LoRA., got the vision tower's .* of class torch.ao",
    distribute: "neither split over devices .tensor parallel. nor quantised, got blocks.0.mlp.up_proj.weight .* DT",
    offload: "weights in memory, got blocks.2.norm1.weight on the meta device",
    hook_by_accelerate: "no hooks of accelerate .device_map over several devices, offload., got one on .* blocks.1",
    hook_forward: "no hooks inside the vision tower, got hook_forward on the vision tower's blocks.1",
    hook_before: "no hooks inside the vision tower, got hook_before on the vision tower's patch_embed",
    hook_backward: "no hooks inside the vision tower, got .* on the vision tower's merger",
    mix_dtypes: "one dtype in the whole vision tower, got .* with torch.float32, merger.* with torch.bfloat16",
    convert_to_fp64: "weights in one of torch.float32, torch.bfloat16, torch.float16, got torch.float64",
    add_a_parameter: "parameters of a qwen2_5_vl tower of its config, got differing ones: scale: expected none",
    prune: "differing ones: blocks.2.attn.proj.bias: expected .128,., got none; .*; and 8 more",
    replace_forward: "the vision tower's own forward, got a replaced one on the vision tower",
    replace_inner_forward: "the vision tower's own forward, got a replaced one on the vision tower's blocks.1.norm1",
}


class TestRefusals:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("change", REFUSALS, ids=lambda change: change.__name__)
    def test_before(self, models, impl, change):
        model = copy.deepcopy(models["qwen2_5_vl"])
        change(visual(model))
        before = {name: vars(module).copy() for name, module in model.named_modules()}
        parameters = list(model.parameters())
        with pytest.raises(ValueError, match=rf"^model: expected .*{REFUSALS[change]}.*; the model is unchanged$"):
            use_tower(model, impl, free_original=True)
        assert {name: vars(module) for name, module in model.named_modules()} == before
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_several_devices(self, models):
        model = copy.deepcopy(models["qwen2_5_vl"])
        visual(model).blocks[1].cuda()
        with pytest.raises(ValueError, match=r"one device for the whole vision tower, got .* with cpu, .* with cuda:0"):
            use_tower(model)

    def test_an_explicit_choice_that_cannot_run(self, qwen2_5, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match=r"^impl: 'triton' cannot run here: cpu is no CUDA device"):
            use_tower(qwen2_5, "triton")
        with pytest.raises(ValueError, match=r"^impl: expected 'auto', 'triton' or 'reference', got 'fast'"):
            use_tower(qwen2_5, "fast")

    @pytest.mark.parametrize(
        "change",
        [
            lambda tower: tower.to(torch.bfloat16),
            lambda tower: tower.blocks[0].register_module("attn", copy.deepcopy(tower.blocks[0].attn)),
            lambda tower: setattr(tower.merger.ln_q, "weight", nn.Parameter(torch.ones(128))),
            lambda tower: tower.load_state_dict({n: t.clone() for n, t in tower.state_dict().items()}, assign=True),
        ],
        ids=["converted", "adapted", "replaced", "loaded"],
    )
    def test_a_model_that_changed_since(self, models, impl, change):
        model = copy.deepcopy(models["qwen2_5_vl"])
        inputs = inputs_for(model, BATCHES["an image"])
        handle = use_tower(model, impl)
        log_probabilities(model, inputs)
        change(visual(model))
        with pytest.raises(ValueError, match=r"^model: its vision tower was moved, converted, loaded or adapted after"):
            log_probabilities(model, inputs)
        handle.remove()
        log_probabilities(model, inputs)
        if change(visual(model)) is None:
            return
        with use_tower(model, impl):
            log_probabilities(model, inputs)

    def test_weights_written_in_place_after_packing(self, models, fast):
        model = copy.deepcopy(models["qwen2_5_vl"])
        inputs = inputs_for(model, BATCHES["an image"])
        with use_tower(model, fast):
            model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})
            with pytest.raises(ValueError, match=r"^model: its vision tower was moved, converted, loaded or adapted"):
                log_probabilities(model, inputs)

    def test_hooks_added_since(self, models, impl):
        model = copy.deepcopy(models["qwen2_5_vl"])
        inputs = inputs_for(model, BATCHES["an image"])
        with use_tower(model, impl):
            hook = visual(model).blocks[1].mlp.register_forward_hook(lambda *_: None)
            with pytest.raises(
                ValueError, match=r"^model: expected no hooks inside the vision tower, got 1 added after"
            ):
                log_probabilities(model, inputs)
            hook.remove()
            log_probabilities(model, inputs)

    def test_a_model_converted_while_freed_is_restored_in_its_new_dtype(self, models, fast):
        model = copy.deepcopy(models["qwen2_5_vl"])
        expected = copy.deepcopy(model).to(torch.bfloat16).state_dict()
        handle = use_tower(model, fast, free_original=True)
        model.to(torch.bfloat16)
        handle.remove()
        got = model.state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())

    def test_arguments_of_a_call(self, model, impl):
        inputs = inputs_for(model, BATCHES["an image"])
        tower, arguments = visual(model), (inputs["pixel_values"], inputs["image_grid_thw"])
        with use_tower(model, impl), torch.no_grad():
            for name in integration.PRECOMPUTED:
                with pytest.raises(
                    ValueError, match=f"^{name}: expected none, which qwenvit's tower computes of grid_th"
                ):
                    tower(*arguments, **{name: torch.zeros(1)})
                tower(*arguments, **{name: None})
            with pytest.raises(ValueError, match=r"^output_attentions: qwenvit's vision tower keeps no attention"):
                tower(*arguments, output_attentions=True)
            with pytest.raises(ValueError, match=r"^pixel_values: grid_thw .* describes 60 patches, got 59"):
                tower(arguments[0][1:], arguments[1])
            with pytest.raises(ValueError, match=r"^hidden_states: expected pixel values on the tower's cpu, got meta"):
                tower(arguments[0].to("meta"), arguments[1])
            assert torch.equal(  # a leading dimension, as transformers' towers accept it
                tower(arguments[0][None], arguments[1]).pooler_output, tower(*arguments).pooler_output
            )

    @needs_pinned_transformers
    def test_every_precomputed_argument_is_known(self):
        source = inspect.getsource(vision_utils) + inspect.getsource(vision_utils.get_max_seqlen)
        names = set(re.findall(r'kwargs\.pop\("(\w+)"', source)) | set(re.findall(r'kwarg_name: str = "(\w+)"', source))
        names |= {"max_window_seqlen"}  # passed as kwarg_name by the windowed towers
        for_other_models = {"merged_shape"}
        assert names - for_other_models == set(integration.PRECOMPUTED)
