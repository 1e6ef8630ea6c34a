"""What towers and models of transformers compute with use_attention, against their own attention, sdpa and eager."""

import pytest
import torch

from common.hf_towers import build_tower, forward
from qwenvit.integrations.transformers import attention as integration
from qwenvit.integrations.transformers import use_attention
from qwenvit.parity import no_worse
from support.tiny_models import CLASSES, LOG_PROBABILITY_BOUND, inputs_for, visual
from support.towers import FULL, MIXED_GRIDS, narrow
from support.use_attention import (
    BATCHES,
    DEVICE,
    assert_close,
    build_wide,
    implementations,
    tower_inputs,
)


@pytest.fixture(params=CLASSES)
def model(request):
    return build_wide(request.param)


@pytest.mark.parametrize(("own", "impl"), [("sdpa", "triton"), ("eager", "reference")])
@pytest.mark.parametrize("family", FULL)
def test_a_tower_gives_the_same_embeddings(family, own, impl, calls):
    config = narrow(family, depth=2)
    tower = build_tower(config, device=DEVICE)
    tower.set_attn_implementation(own)
    inputs = tower_inputs(config)
    expected = forward(tower, *inputs)
    with use_attention(tower, impl):
        states, tokens, deepstack = forward(tower, *inputs)
        assert len(calls) == config.depth
    for actual, truth in zip((states, tokens, *deepstack), (*expected[:2], *expected[2]), strict=True):
        assert_close(actual, truth)
    for actual, truth in zip(forward(tower, *inputs)[:2], expected[:2], strict=True):
        assert torch.equal(actual, truth)
    assert len(calls) == config.depth


@pytest.mark.parametrize("batch", BATCHES)
def test_a_model_gives_the_same_tokens_and_log_probabilities(model, batch, calls):
    inputs = inputs_for(model, BATCHES[batch])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    assert not calls
    with use_attention(model):
        actual = model.generate(**inputs, **options)
    assert len(calls) == 2 * (2 if batch == "both" else 1)  # the blocks; images and videos are encoded separately
    assert torch.equal(actual.sequences, expected.sequences)
    ours, theirs = (torch.stack(output.logits).log_softmax(-1) for output in (actual, expected))
    assert (ours - theirs).abs().max() < LOG_PROBABILITY_BOUND
    again = model.generate(**inputs, **options)
    assert all(map(torch.equal, again.logits, expected.logits))


def test_the_attention_matters_to_these_models(model, monkeypatch):
    # Otherwise equal tokens would prove nothing: scores that are 2 % off change the log-probabilities.
    inputs = inputs_for(model, BATCHES["both"])
    rope_attention = integration.ops.rope_attention

    def wrong(q, *arguments, **options):
        return rope_attention(1.02 * q, *arguments, **options)

    with torch.no_grad():
        expected = model(**inputs).logits.log_softmax(-1)
        monkeypatch.setattr(integration.ops, "rope_attention", wrong)
        with use_attention(model):
            actual = model(**inputs).logits.log_softmax(-1)
    assert (actual - expected).abs().max() > 3 * LOG_PROBABILITY_BOUND


def test_only_the_vision_tower_changes(model, calls):
    before = implementations(model)
    assert {name for _, name in before} == {"sdpa"}
    with use_attention(model):
        changed = [after[0] for after, own in zip(implementations(model), before, strict=True) if after != own]
        assert changed == [type(visual(model).config).__name__]
        with torch.no_grad():
            model(**inputs_for(model, [[("text", 5)]]))
        assert not calls
    assert implementations(model) == before


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FULL)
def test_16_bits_on_a_gpu_are_no_worse_than_sdpa(family, dtype, calls):
    config = narrow(family, depth=4)
    tower = build_tower(config, device="cuda")
    pixels, grid_thw = tower_inputs(config, [*MIXED_GRIDS, [1, 64, 64]])
    truth = forward(tower, pixels, grid_thw)[1]
    tower.to(dtype)
    theirs = forward(tower, pixels.to(dtype), grid_thw)[1]
    with use_attention(tower):
        ours = forward(tower, pixels.to(dtype), grid_thw)[1]
    assert len(calls) == config.depth
    check = no_worse("tokens", ours, theirs, truth)
    assert check.passed, check
