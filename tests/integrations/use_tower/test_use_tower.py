"""What tiny models of transformers compute with use_tower: what they compute without it."""

import pytest
import torch

from qwenvit.integrations.transformers import use_qwenvit, use_tower
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.pinned import needs_pinned_transformers
from support.tiny_models import LOG_PROBABILITY_BOUND, base, inputs_for, is_omni, visual
from support.use_tower import BATCHES, assert_close, log_probabilities


def generate(model, inputs, **options):
    base(model).rope_deltas = None
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)


class TestWhatTheModelComputes:
    @pytest.mark.parametrize("padding", ["left", "right"])
    @pytest.mark.parametrize("batch", BATCHES)
    def test_log_probabilities(self, model, impl, batch, padding):
        inputs = inputs_for(model, BATCHES[batch], padding)
        expected = log_probabilities(model, inputs)
        with use_tower(model, impl):
            assert_close(log_probabilities(model, inputs), expected)
        assert torch.equal(log_probabilities(model, inputs), expected)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_generated_tokens(self, model, impl, beams):
        inputs = inputs_for(model, BATCHES["both"])
        expected = generate(model, inputs, num_beams=beams)
        with use_tower(model, impl):
            assert torch.equal(generate(model, inputs, num_beams=beams), expected)
        assert torch.equal(generate(model, inputs, num_beams=beams), expected)

    @needs_pinned_transformers
    @pytest.mark.parametrize("batch", BATCHES)
    def test_the_reference_tower_gives_the_same_bits(self, model, batch):
        inputs = inputs_for(model, BATCHES[batch])
        expected = log_probabilities(model, inputs)
        with use_tower(model):
            assert torch.equal(log_probabilities(model, inputs), expected)

    @pytest.mark.parametrize("modality", ["image", "video"])
    def test_features(self, model, impl, modality):
        inputs = inputs_for(model, BATCHES["both"])
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[modality]
        arguments = (inputs[pixels], inputs[f"{modality}_grid_thw"])
        call = torch.no_grad()(getattr(model, f"get_{modality}_features"))
        expected = call(*arguments, output_hidden_states=True)
        with use_tower(model, impl):
            got = call(*arguments, output_hidden_states=True)
            plain = call(*arguments)
        assert type(got) is type(expected)
        assert list(got) == list(expected)
        assert "hidden_states" not in plain
        assert len(got.hidden_states) == len(visual(model).blocks) + 1
        for name in got:
            assert type(got[name]) is type(expected[name])
            assert len(got[name]) == len(expected[name])
            for one, other in zip(flat(got[name]), flat(expected[name]), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        for name in plain:
            assert all(torch.equal(a, b) for a, b in zip(flat(plain[name]), flat(got[name]), strict=True))

    @needs_pinned_transformers
    def test_hidden_states_chosen_by_index(self, qwen2_5, impl):
        inputs = inputs_for(qwen2_5, BATCHES["an image"])
        arguments = (inputs["pixel_values"], inputs["image_grid_thw"])
        every = visual(qwen2_5)(*arguments, output_hidden_states=True).hidden_states
        theirs = visual(qwen2_5)(*arguments, output_hidden_states=[1, 3, 9]).hidden_states
        with use_tower(qwen2_5, impl), torch.no_grad():
            ours = visual(qwen2_5)(*arguments, output_hidden_states=[1, 3, 9]).hidden_states
            last = visual(qwen2_5)(*arguments, output_hidden_states=[-1]).hidden_states
        assert [state is None for state in ours] == [state is None for state in theirs] == [True, False, True, False]
        for got in (ours[1:2], ours[3:], last[3:]):
            assert got[0] is not None
        assert_close(ours[1], every[1].detach())
        assert_close(ours[3], every[3].detach())
        assert [state is None for state in last] == [True, True, True, False]

    def test_the_configs_defaults_are_read(self, qwen2_5, impl, monkeypatch):
        inputs = inputs_for(qwen2_5, BATCHES["an image"])
        monkeypatch.setattr(visual(qwen2_5).config, "output_hidden_states", True)
        with use_tower(qwen2_5, impl), torch.no_grad():
            out = visual(qwen2_5)(inputs["pixel_values"], inputs["image_grid_thw"])
            assert len(out.hidden_states) == 4
            as_tuple = visual(qwen2_5)(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert torch.equal(as_tuple[1], out.pooler_output)

    def test_a_call_with_hidden_states_leaves_no_hooks_and_no_obstacle(self, model, impl):
        inputs = inputs_for(model, BATCHES["an image"])
        with use_tower(model, impl) as handle:
            log_probabilities(model, inputs, output_hidden_states=True)  # transformers installs hooks that stay
            assert not any(module._forward_hooks for module in handle.tower.modules())
            log_probabilities(model, inputs)
        with use_tower(model, impl):
            log_probabilities(model, inputs)

    def test_the_tower_matters_to_these_models(self, model, impl):
        # Otherwise equal log-probabilities would prove nothing: a tower that is 1 % off is found.
        inputs = inputs_for(model, BATCHES["both"])
        expected = log_probabilities(model, inputs)
        with use_tower(model, impl) as handle:
            handle.tower.merger.register_forward_hook(lambda _, __, tokens: tokens * 1.01)
            assert (log_probabilities(model, inputs) - expected).abs().max() > 2 * LOG_PROBABILITY_BOUND

    def test_both_towers_and_positions(self, model, impl):
        inputs = inputs_for(model, BATCHES["both"])
        if is_omni(model.config.model_type):
            with pytest.raises(ValueError, match=r"^model: expected a family with positions .* got .*; call use_tower"):
                use_qwenvit(model, impl)
            return
        if "second_per_grid_ts" in inputs:
            inputs["second_per_grid_ts"].fill_(1.0)  # transformers 5.17 truncates fractions
        expected, tokens = log_probabilities(model, inputs), generate(model, inputs)
        with use_qwenvit(model, impl) as handle:
            assert "get_rope_index" in vars(model.model)
            assert_close(log_probabilities(model, inputs), expected)
            assert torch.equal(generate(model, inputs), tokens)
            assert isinstance(handle.tower.tower, FastTower if impl == "triton" else ReferenceTower)
        assert "get_rope_index" not in vars(model.model)

    @pytest.mark.parametrize("way", ["language model", "model"])
    def test_torch_compile(self, qwen2_5, impl, way):
        inputs = inputs_for(qwen2_5, BATCHES["both"])
        expected = log_probabilities(qwen2_5, inputs)
        torch.compiler.reset()
        traced = []
        with use_tower(qwen2_5, impl) as handle:
            handle.tower.register_forward_hook(lambda *_: traced.append(torch.compiler.is_compiling()))
            if way == "model":
                got = log_probabilities(torch.compile(qwen2_5, backend="eager"), inputs)
            else:
                inner = qwen2_5.model
                own = inner.language_model
                inner.language_model = torch.compile(own, backend="eager")
                got = log_probabilities(qwen2_5, inputs)
                inner.language_model = own
        assert traced == [False, False]  # images and videos, both outside the compiled graphs
        assert_close(got, expected)
        torch.compiler.reset()

    def test_hooks_on_the_tower_itself_go_on_working(self, qwen2_5, impl):
        calls = []
        hook = visual(qwen2_5).register_forward_hook(lambda _, __, out: calls.append(out.pooler_output.shape))
        inputs = inputs_for(qwen2_5, BATCHES["an image"])
        with use_tower(qwen2_5, impl):
            log_probabilities(qwen2_5, inputs)
        hook.remove()
        assert calls == [torch.Size([15, 64])]


def flat(value):
    """Return the tensors in nested lists and tuples."""
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in flat(part)]
