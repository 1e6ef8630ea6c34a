"""Adapters, hooks and replaced layers in a tower with use_attention, and gradients through it."""

import copy

import pytest
import torch
from torch import nn

from common.hf_towers import forward
from qwenvit.integrations.transformers import use_attention
from support.tiny_models import LOG_PROBABILITY_BOUND, inputs_for
from support.use_attention import BATCHES, DEVICE, assert_close, tiny_tower


class TestAdapters:
    """Modules and hooks inside the tower take part as before."""

    @staticmethod
    def low_rank(linear):
        """Return a LoRA on a linear map: two matrices, and a hook that adds their product."""
        generator = torch.Generator().manual_seed(linear.out_features)
        down = 0.1 * torch.randn(4, linear.in_features, generator=generator)
        up = 0.1 * torch.randn(linear.out_features, 4, generator=generator)
        matrices = [nn.Parameter(matrix.to(DEVICE)) for matrix in (down, up)]
        linear.register_forward_hook(lambda _, inputs, output: output + inputs[0] @ matrices[0].T @ matrices[1].T)
        return matrices

    def adapted(self, family="qwen3_vl", layers=("qkv", "proj")):
        tower, inputs = tiny_tower(family)
        tower.requires_grad_(False)
        matrices = [m for b in tower.blocks for layer in layers for m in self.low_rank(getattr(b.attn, layer))]
        return tower, inputs, matrices

    def gradients(self, tower, inputs, matrices):
        tokens = tower(inputs[0], grid_thw=inputs[1]).pooler_output
        return tokens.detach(), torch.autograd.grad(tokens.square().mean(), matrices)

    def test_training_with_the_reference_gives_the_same_gradients(self, calls):
        tower, inputs, matrices = self.adapted()
        expected, expected_gradients = self.gradients(tower, inputs, matrices)
        with use_attention(tower, "reference"):
            tokens, gradients = self.gradients(tower, inputs, matrices)
        assert len(calls) == 2
        assert_close(tokens, expected)
        for actual, truth in zip(gradients, expected_gradients, strict=True):
            assert truth.any()
            assert_close(actual, truth)

    @pytest.mark.parametrize("layers", [("qkv",), ("q",), ("k",), ("v",)], ids=str)
    def test_triton_refuses_gradients_and_infers(self, layers):
        tower, inputs, _ = self.adapted("qwen2_5_omni" if layers != ("qkv",) else "qwen3_vl", layers)
        expected = forward(tower, *inputs)[1]
        with use_attention(tower, "triton"):
            with pytest.raises(ValueError, match=r"^impl: 'triton' means Triton here, which gives no gradients; expec"):
                tower(inputs[0], grid_thw=inputs[1])
            assert_close(forward(tower, *inputs)[1], expected)  # without gradients

    def test_a_frozen_tower_is_no_training(self):
        tower, inputs = tiny_tower()
        tower.requires_grad_(False)
        with use_attention(tower, "triton"):
            tower(inputs[0], grid_thw=inputs[1])

    def test_hooks_fire_and_replaced_linears_compute(self):
        class Quantised(nn.Module):  # whose weight is no parameter, and of whole numbers
            def __init__(self, linear):
                super().__init__()
                self.scale, self.bias = linear.weight.abs().max() / 127, linear.bias
                self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

            def forward(self, x):
                return x @ (self.weight * self.scale).T + self.bias

        tower, inputs = tiny_tower()
        seen = []
        with torch.no_grad():
            for block in tower.blocks:
                block.attn.qkv, block.attn.proj = Quantised(block.attn.qkv), Quantised(block.attn.proj)
                block.attn.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
        expected = forward(tower, *inputs)[1]
        with use_attention(tower, "triton"):
            assert_close(forward(tower, *inputs)[1], expected)
        assert len(seen) == 2 * 2
        for theirs, ours in zip(seen[:2], seen[2:], strict=True):
            assert_close(ours, theirs)

    def test_peft(self, qwen3):
        peft = pytest.importorskip("peft", reason="needs peft")
        model = copy.deepcopy(qwen3)
        lora = peft.LoraConfig(target_modules=r".*visual.*\.attn\.(qkv|proj)", init_lora_weights=False)
        wrapped = peft.get_peft_model(model, lora)
        inputs = inputs_for(model, BATCHES["both"])
        expected = wrapped(**inputs, labels=inputs["input_ids"]).loss
        with use_attention(wrapped, "reference"):
            actual = wrapped(**inputs, labels=inputs["input_ids"]).loss
        assert (actual - expected).abs() < LOG_PROBABILITY_BOUND
        trained = [parameter for name, parameter in wrapped.named_parameters() if "lora" in name]
        for ours, theirs in zip(*(torch.autograd.grad(x, trained) for x in (actual, expected)), strict=True):
            assert_close(ours, theirs)
