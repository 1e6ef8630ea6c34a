"""use_attention's removal, what of it a copy keeps, and what a saved config has."""

import copy
import json

import pytest
import torch

from qwenvit.integrations.transformers import use_attention
from support.tiny_models import inputs_for, visual
from support.use_attention import BATCHES, implementations


class TestRemoval:
    def test_remove(self, qwen3):
        before = implementations(qwen3)
        handle = use_attention(qwen3)
        assert implementations(qwen3) != before
        handle.remove()
        assert implementations(qwen3) == before
        handle.remove()
        assert implementations(qwen3) == before

    def test_an_old_handle_does_not_undo_a_new_replacement(self, qwen3):
        old = use_attention(qwen3)
        old.remove()
        with use_attention(qwen3, "reference"):
            old.remove()
            assert visual(qwen3).config._attn_implementation == "qwenvit_flash_reference"
        assert visual(qwen3).config._attn_implementation == "sdpa"

    def test_an_exception_in_the_block(self, qwen3):
        before = implementations(qwen3)
        with pytest.raises(KeyError), use_attention(qwen3):
            raise KeyError
        assert implementations(qwen3) == before

    def test_an_attention_chosen_since_stays(self, qwen3):
        with use_attention(qwen3):
            qwen3.set_attn_implementation({"vision_config": "eager"})
        assert visual(qwen3).config._attn_implementation == "eager"
        qwen3.set_attn_implementation("sdpa")

    def test_the_language_model_may_choose_another(self, qwen3, calls):
        with use_attention(qwen3):
            qwen3.set_attn_implementation({"text_config": "eager"})
            with torch.no_grad():
                qwen3(**inputs_for(qwen3, BATCHES["an image"]))
            assert len(calls) == 2
        assert dict(implementations(qwen3)) == {
            "Qwen3VLConfig": "sdpa",
            "Qwen3VLVisionConfig": "sdpa",
            "Qwen3VLTextConfig": "eager",
        }
        qwen3.set_attn_implementation("sdpa")


def test_a_copy_keeps_the_replacement(qwen3, calls):
    inputs = inputs_for(qwen3, BATCHES["an image"])
    with use_attention(qwen3):
        other = copy.deepcopy(qwen3)
    with torch.no_grad():
        other(**inputs)
    assert len(calls) == 2
    with pytest.raises(
        ValueError, match=r"got a replaced one; call remove\(\) first \(on a copied model, set_attn_imp"
    ):
        use_attention(other)
    other.set_attn_implementation({"vision_config": "sdpa"})
    with torch.no_grad():
        assert torch.equal(other(**inputs).logits, qwen3(**inputs).logits)
    assert len(calls) == 2


def test_saving_writes_nothing_of_it(qwen3, tmp_path):
    qwen3.config.save_pretrained(tmp_path / "before")
    with use_attention(qwen3):
        qwen3.config.save_pretrained(tmp_path / "within")
    before, within = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "within"))
    assert before == within
