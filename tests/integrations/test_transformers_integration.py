"""use_rope_index on tiny models of transformers: equal tokens and logits, with it and after its removal."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwenvit.integrations.transformers import RopeIndexHandle, use_rope_index
from qwenvit.integrations.transformers import rope_index as integration
from support import tiny_models
from support.pinned import needs_pinned_transformers
from support.tiny_models import build

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
BATCHES = {
    "an image": [[("text", 3), ("image", (1, 6, 8)), ("text", 4)]],
    "a video": [[("text", 3), ("video", (3, 4, 6)), ("text", 4)]],
    "both, padded": [
        [("text", 2), ("image", (1, 4, 4)), ("text", 3), ("video", (2, 4, 4)), ("text", 1), ("image", (1, 2, 2))],
        [("text", 2), ("image", (1, 6, 4)), ("text", 3)],
    ],
    "a row of text": [[("video", (2, 4, 4)), ("text", 3)], [("text", 5)]],
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: at these sizes, several threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models():
    return {family: build(family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def model(request, models):
    return models[request.param]


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of qwenvit's rope_index."""
    calls = []

    def spy(**arguments):
        calls.append(arguments)
        return rope_index(**arguments)

    rope_index = integration.rope_index
    monkeypatch.setattr(integration, "rope_index", spy)
    return calls


def inputs_for(model, batch, padding="left"):
    return tiny_models.inputs_for(model, BATCHES[batch], padding)


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)


def forward(model, inputs):
    model.model.rope_deltas = None
    return model(**inputs, labels=inputs["input_ids"])


@needs_pinned_transformers
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("batch", BATCHES)
def test_generation_gives_the_same_tokens(model, batch, padding, calls, monkeypatch):
    inputs = inputs_for(model, batch, padding)
    expected = generate(model, inputs)
    deltas = model.model.rope_deltas
    with use_rope_index(model), monkeypatch.context() as patch:
        patch.setattr(type(model.model), "get_rope_index", None)  # a call of transformers' own would fail
        got = generate(model, inputs)
    assert torch.equal(got, expected)
    assert torch.equal(model.model.rope_deltas, deltas)
    assert len(calls) == 1
    assert torch.equal(generate(model, inputs), expected)
    assert len(calls) == 1


@needs_pinned_transformers
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams(model, options, calls):
    inputs = inputs_for(model, "both, padded")
    expected = generate(model, inputs, **options)
    with use_rope_index(model):
        assert torch.equal(generate(model, inputs, **options), expected)
    assert calls


@needs_pinned_transformers
@pytest.mark.parametrize("batch", BATCHES)
def test_a_training_step_gives_the_same_logits_and_loss(model, batch, calls):
    inputs = inputs_for(model, batch, "right")
    expected = forward(model, inputs)
    with use_rope_index(model):
        got = forward(model, inputs)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    assert len(calls) == 1


def test_positions_matter_to_these_models(model, monkeypatch):
    # Otherwise equal tokens would prove nothing: moving one token by one position in height changes the logits.
    inputs = inputs_for(model, "both, padded")
    expected = forward(model, inputs)
    rope_index = integration.rope_index

    def wrong(**arguments):
        positions, deltas = rope_index(**arguments)
        positions[1, :, -1] += 1
        return positions, deltas

    monkeypatch.setattr(integration, "rope_index", wrong)
    with use_rope_index(model):
        assert not torch.equal(forward(model, inputs).logits, expected.logits)


class TestRemoval:
    @staticmethod
    def has_own_method(model):
        inner = model.model
        return "get_rope_index" not in vars(inner) and inner.get_rope_index.__func__ is type(inner).get_rope_index

    def test_remove(self, model):
        handle = use_rope_index(model)
        assert isinstance(handle, RopeIndexHandle)
        assert not self.has_own_method(model)
        handle.remove()
        assert self.has_own_method(model)
        handle.remove()
        assert self.has_own_method(model)

    def test_an_old_handle_does_not_undo_a_new_replacement(self, model):
        old = use_rope_index(model)
        old.remove()
        with use_rope_index(model):
            old.remove()
            assert not self.has_own_method(model)
        assert self.has_own_method(model)

    def test_leaving_the_block(self, model):
        with use_rope_index(model) as handle:
            assert isinstance(handle, RopeIndexHandle)
            assert not self.has_own_method(model)
        assert self.has_own_method(model)

    def test_an_exception_in_the_block(self, model):
        with pytest.raises(KeyError), use_rope_index(model):
            raise KeyError
        assert self.has_own_method(model)

    def test_twice(self, model):
        with use_rope_index(model):
            with pytest.raises(
                ValueError, match=r"^model: expected its own get_rope_index, got a replaced one; call remove"
            ):
                use_rope_index(model)
            assert not self.has_own_method(model)
        assert self.has_own_method(model)


@needs_pinned_transformers
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_keeps_the_replacement_and_its_own_config(model, way, calls):
    inputs = inputs_for(model, "both, padded")
    expected = forward(model, inputs)
    with use_rope_index(model):
        other = way(model)
    assert torch.equal(forward(other, inputs).logits, expected.logits)
    assert len(calls) == 1
    assert calls[0]["family"] is other.config
    assert torch.equal(forward(model, inputs).logits, expected.logits)
    assert len(calls) == 1


def test_the_model_is_found_inside_other_modules(models, calls):
    model = models["qwen3_vl"]
    inputs = inputs_for(model, "an image")
    expected = generate(model, inputs)
    for holder in (model, model.model, nn.Sequential(model), nn.ModuleDict({"deep": nn.Sequential(model)})):
        with use_rope_index(holder):
            assert torch.equal(generate(model, inputs), expected)
    assert len(calls) == 4


@pytest.mark.parametrize("thing", [None, 3, "qwen2_vl", SimpleNamespace(get_rope_index=None)], ids=str)
def test_an_argument_that_is_not_a_module(thing):
    with pytest.raises(TypeError, match=f"^model: expected a transformers model, got {type(thing).__name__}"):
        use_rope_index(thing)


def test_no_supported_model_or_more_than_one(models):
    words = r"^model: expected exactly one module with get_rope_index, got {} in {}"
    for thing, count in ((nn.Linear(2, 2), 0), (models["qwen2_vl"].model.visual, 0), (models["qwen2_vl"].lm_head, 0),
                         (nn.ModuleList([models["qwen2_vl"], models["qwen3_vl"]]), 2)):  # fmt: skip
        with pytest.raises(TypeError, match=words.format(count, type(thing).__name__)):
            use_rope_index(thing)


class Omni(nn.Module):
    config = SimpleNamespace(model_type="qwen2_5_omni_thinker")

    def get_rope_index(self, input_ids, mm_token_type_ids):
        raise NotImplementedError


class Old(nn.Module):
    config = SimpleNamespace(model_type="qwen2_vl")

    def get_rope_index(self, input_ids, image_grid_thw=None, video_grid_thw=None, attention_mask=None):
        raise NotImplementedError


def test_other_families_and_old_versions():
    with pytest.raises(ValueError, match=r"^family: expected one of qwen2_vl, .*, got 'qwen2_5_omni'"):
        use_rope_index(Omni())
    with pytest.raises(ValueError, match=r"^model: expected a model of transformers 5"):
        use_rope_index(Old())
