"""What use_attention refuses, and leaves as it was."""

import pytest
from torch import nn

from qwenvit.integrations.transformers import use_attention, use_tower
from support.tiny_models import build, visual
from support.use_attention import build_wide, implementations, tiny_tower


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _unchanged(self, qwen3):
        before = implementations(qwen3)
        yield
        assert implementations(qwen3) == before

    def refused(self, kind, message, model, *options):
        with pytest.raises(kind, match=f"^{message}"):
            use_attention(model, *options)

    @pytest.mark.parametrize("thing", [None, 3, "qwen2_vl"], ids=str)
    def test_no_module(self, thing):
        self.refused(TypeError, "model: expected a transformers model", thing)

    def test_no_tower_or_two(self, qwen3):
        self.refused(TypeError, "model: expected exactly one vision tower .* got 0 in Linear", nn.Linear(2, 2))
        two = nn.ModuleList([qwen3, build_wide("qwen2_vl")])
        self.refused(TypeError, "model: expected exactly one vision tower .* got 2 in ModuleList", two)

    def test_an_unknown_impl(self, qwen3):
        self.refused(ValueError, "impl: expected one of 'auto', 'triton', 'reference', got 'fast'", qwen3, "fast")

    def test_heads_of_another_width(self):
        message = r"model: expected a vision tower with heads of \(64, 72, 80\) channels, got heads of 16"
        self.refused(ValueError, message, build("qwen3_vl"))

    def test_twice(self, qwen3):
        with use_attention(qwen3):
            name = visual(qwen3).config._attn_implementation
            for impl in ("auto", "reference"):
                self.refused(ValueError, "model: expected the vision tower's own attention", qwen3, impl)
            assert visual(qwen3).config._attn_implementation == name

    def test_a_replaced_tower(self, qwen3):
        with use_tower(qwen3, "reference"):
            self.refused(ValueError, "model: expected its own vision tower, got one that use_tower replaced", qwen3)

    def test_attention_weights_in_the_config(self):
        tower = tiny_tower()[0]
        tower.set_attn_implementation("eager")
        tower.config.output_attentions = True
        self.refused(ValueError, "model: expected output_attentions=False in the vision tower's config", tower)
