"""Gradients and training with use_tower: which flow, and which the fast tower refuses."""

import copy

import pytest
import torch

from qwenvit.integrations.transformers import use_tower
from support.tiny_models import base, inputs_for, visual
from support.use_tower import BATCHES, gradients, log_probabilities


class TestGradients:
    def test_the_fast_tower_gives_none(self, qwen2_5, fast):
        inputs = inputs_for(qwen2_5, BATCHES["an image"])
        with use_tower(qwen2_5, fast):
            with pytest.raises(ValueError, match=r"^parameters of the vision tower: expected none .*='reference'\)"):
                qwen2_5(**inputs)
            visual(qwen2_5).requires_grad_(False)
            asking = inputs | {"pixel_values": inputs["pixel_values"].clone().requires_grad_()}
            with pytest.raises(ValueError, match=r"^pixel_values of the vision tower: expected none"):
                qwen2_5(**asking)
            log_probabilities(qwen2_5, asking)
        visual(qwen2_5).requires_grad_(True)

    def test_the_language_models_gradients_flow(self, model, impl):
        inputs = inputs_for(model, BATCHES["both"], "right")
        visual(model).requires_grad_(False)

        expected = gradients(model, inputs)
        with use_tower(model, impl):
            got = gradients(model, inputs)
        model.zero_grad(set_to_none=True)
        visual(model).requires_grad_(True)
        assert len(expected) > 10
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-3)

    def test_gradient_checkpointing_of_the_language_model(self, models, impl):
        model = copy.deepcopy(models["qwen2_5_vl"])
        inputs = inputs_for(model, BATCHES["both"], "right")
        visual(model).requires_grad_(False)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.gradient_checkpointing_enable()  # hooks the patch embedding, too
        with use_tower(model.train(), impl):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3)
        hooks = visual(model).patch_embed._forward_hooks.values()
        assert any(hook.__name__ == "make_inputs_require_grads" for hook in hooks)

    def test_the_reference_towers_gradients_reach_the_models_parameters(self, model):
        inputs = inputs_for(model, BATCHES["both"], "right")

        def gradients():
            model.zero_grad(set_to_none=True)
            base(model).rope_deltas = None
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            return {name: parameter.grad for name, parameter in visual(model).named_parameters()}

        expected = gradients()
        with use_tower(model, "reference"):
            got = gradients()
        model.zero_grad(set_to_none=True)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3)

    def test_a_step_of_training_with_the_reference_tower(self, models):
        model = copy.deepcopy(models["qwen3_vl"])
        inputs = inputs_for(model, BATCHES["an image"])
        before = log_probabilities(model, inputs)
        with use_tower(model, "reference"), torch.no_grad():
            visual(model).merger.linear_fc2.weight.mul_(1.1)  # as an optimizer writes
            inside = log_probabilities(model, inputs)
        assert not torch.equal(inside, before)
        torch.testing.assert_close(log_probabilities(model, inputs), inside, atol=1e-5, rtol=0)
