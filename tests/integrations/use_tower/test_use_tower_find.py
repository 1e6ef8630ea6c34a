"""Where use_tower finds the one vision tower: in models, retrievers, pipelines and what wraps them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.colqwen2 import ColQwen2Config, ColQwen2ForRetrieval

from qwenvit.integrations.transformers import loaded_tower, use_tower
from support.tiny_models import IMAGE, TEXT, processor, visual


class TestWhereTheTowerIsFound:
    def test_inside_other_modules(self, qwen2_5):
        expected_class = type(visual(qwen2_5))
        holders = (qwen2_5, qwen2_5.model, visual(qwen2_5), nn.Sequential(qwen2_5), torch.compile(qwen2_5))
        for holder in holders:
            with use_tower(holder):
                assert "forward" in vars(visual(qwen2_5))
            assert "forward" not in vars(visual(qwen2_5))
        assert type(visual(qwen2_5)) is expected_class

    def test_in_a_chat_pipeline(self, qwen2_5, fast):
        pipe = transformers.pipeline("image-text-to-text", model=qwen2_5, processor=processor(), device="cpu")
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "w1 w2 w3"}]

        def answer():
            chat = [{"role": "user", "content": content}]
            options = {"max_new_tokens": 6, "do_sample": False}
            return pipe(text=chat, generate_kwargs=options, return_full_text=False)[0]["generated_text"]

        calls, expected = [], answer()
        with use_tower(pipe.model, fast) as handle:
            handle.tower.register_forward_hook(lambda *_: calls.append(1))
            assert answer() == expected
        assert len(calls) == 1
        assert len(expected.split()) > 2

    def test_in_a_retriever(self, fast):
        vision = {"depth": 1, "embed_dim": 128, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
        vlm = {"model_type": "qwen2_vl", "text_config": TEXT, "vision_config": vision, "image_token_id": IMAGE}
        torch.manual_seed(0)
        model = ColQwen2ForRetrieval(ColQwen2Config(vlm_config=vlm, embedding_dim=16)).eval()
        grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
        ids = torch.tensor([[5, *[IMAGE] * 6, 7, 8], [9, *[IMAGE] * 4, 4, 3, 2, 1]])
        inputs = {"input_ids": ids, "image_grid_thw": grids, "pixel_values": torch.randn(2, 24, 96)}
        inputs |= {"attention_mask": torch.ones_like(ids), "output_hidden_states": True}
        with torch.no_grad():
            expected = model(**inputs).embeddings
            with use_tower(model, fast):
                torch.testing.assert_close(model(**inputs).embeddings, expected, atol=1e-5, rtol=0)
                inputs["pixel_values"] = inputs["pixel_values"] * 1.1
                assert (model(**inputs).embeddings - expected).abs().max() > 1e-3

    @pytest.mark.parametrize("thing", [None, 3, "qwen2_vl", SimpleNamespace(model=None)], ids=str)
    def test_an_argument_that_is_not_a_module(self, thing):
        with pytest.raises(
            TypeError, match=r"^model: expected a transformers model \(of a pipeline: its .model\), got"
        ):
            use_tower(thing)

    def test_no_tower_or_more_than_one(self, models):
        words = r"^model: expected exactly one vision tower of qwen2_vl, .*, got {} in {}"
        two = nn.ModuleList([models["qwen2_vl"], models["qwen3_vl"]])
        for thing, count in ((nn.Linear(2, 2), 0), (models["qwen2_vl"].lm_head, 0), (two, 2)):
            with pytest.raises(TypeError, match=words.format(count, type(thing).__name__)):
                use_tower(thing)
        assert "forward" not in vars(visual(models["qwen2_vl"]))

    def test_an_old_transformers(self, qwen2_5, monkeypatch):
        monkeypatch.setattr(loaded_tower, "TRANSFORMERS", "4.57.6")
        with pytest.raises(ValueError, match=r"^model: expected a model of transformers 5\.3 or later, got 4\.57\.6"):
            use_tower(qwen2_5)
