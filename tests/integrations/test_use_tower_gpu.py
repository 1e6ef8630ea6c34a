"""use_tower with the fast tower on a GPU: towers of full width and fewer blocks, in front of tiny language models."""

import copy
import gc
from dataclasses import replace

import pytest
import torch

from qwenvit.integrations.transformers import use_qwenvit, use_tower
from qwenvit.parity import Difference
from qwenvit.towers.fast import FastTower
from support.tiny_models import CLASSES, LOG_PROBABILITY_BOUND, base, build_wide, inputs_for, is_omni, visual
from support.towers import FULL
from support.use_tower import gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

NOISE_FACTOR = 1.25
"""Bound of our error over transformers' own, of what the whole model computes: later layers make more or less of an
error at random. Blocks have a sharper bound in tests/towers, and mistakes show in fp32."""
PROMPTS = 8
"""Prompts of which that noise is taken together: of one it may be 1.3 times as large as transformers'."""
ROWS = [
    [
        ("text", 2),
        ("image", (1, 16, 26)),
        ("text", 3),
        ("video", (2, 8, 10)),
        ("text", 2),
        ("image", (1, 2, 40)),
        ("text", 1),
    ],
    [("text", 3), ("image", (1, 10, 6)), ("text", 5)],
]


@pytest.fixture(autouse=True)
def _ieee_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(params=CLASSES)
def model(request):
    """A model on the GPU in fp32, whose tower has the published widths and four blocks."""
    return build_full(request.param)


def build_full(family, device="cuda"):
    published = FULL[family.removesuffix("_moe")]
    config = replace(
        published,
        depth=4,
        out_hidden_size=64,
        fullatt_block_indexes=(3,) if published.traits.windowed else (),
        deepstack_visual_indexes=(0, 2) if published.traits.deepstack else (),
    )
    vision = config.to_hf()
    del vision["model_type"], vision["rope_parameters"]
    with torch.device(device):
        return build_wide(family, {"initializer_range": 0.1}, **vision)


def inputs_on_gpu(model, padding="left"):
    return {name: tensor.cuda() for name, tensor in inputs_for(model, ROWS, padding).items()}


@torch.no_grad()
def log_probabilities(model, inputs):
    base(model).rope_deltas = None
    return model(**inputs).logits.float().log_softmax(-1)


@torch.no_grad()
def features(model, inputs):
    """Return the tokens of all images, and their DeepStack features of each layer, which not all models split."""
    out = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    layers = [out.pooler_output, *out.get("deepstack_features", [])]
    return [layer if isinstance(layer, torch.Tensor) else torch.cat(list(layer)) for layer in layers]


def generate(model, inputs, beams):
    base(model).rope_deltas = None
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=beams)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_fp32(model, padding):
    inputs = inputs_on_gpu(model, padding)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = log_probabilities(model, inputs)
    tokens = [generate(model, inputs, beams) for beams in (1, 2)]
    with use_tower(model, "triton", free_original=True) as handle:
        assert isinstance(handle.tower, FastTower)
        for _ in range(2):  # the second call replays a graph
            torch.testing.assert_close(log_probabilities(model, inputs), expected, atol=LOG_PROBABILITY_BOUND, rtol=0)
        assert all(torch.equal(generate(model, inputs, beams), tokens[beams - 1]) for beams in (1, 2))
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(log_probabilities(model, inputs), expected, atol=LOG_PROBABILITY_BOUND, rtol=0)


def test_bf16_is_within_its_own_noise(model):
    # The language model stays in fp32: its own noise would hide the tower's.
    inputs = inputs_on_gpu(model)
    if "second_per_grid_ts" in inputs:
        inputs["second_per_grid_ts"].fill_(1.0)  # transformers 5.17 truncates fractions
    prompts = [inputs | {"pixel_values": inputs["pixel_values"].roll(count, 0)} for count in range(PROMPTS)]

    def results():
        layers = [torch.cat([layer.flatten() for layer in features(model, prompt)]) for prompt in prompts]
        return torch.cat(layers), torch.cat([log_probabilities(model, prompt) for prompt in prompts])

    tower = visual(model).to(torch.bfloat16).float()
    truth = results()
    tower.to(torch.bfloat16)
    theirs = results()
    use = use_tower if is_omni(model.config.model_type) else use_qwenvit
    with use(model, "triton"):
        ours = results()
    for actual, other, true in zip(ours, theirs, truth, strict=True):
        our_error, their_error = (Difference.of(tensor, true).relative_l2 for tensor in (actual, other))
        assert our_error <= NOISE_FACTOR * their_error, (our_error, their_error)


def test_the_language_models_gradients(model):
    inputs = inputs_on_gpu(model, "right")
    visual(model).requires_grad_(False)

    expected = gradients(model, inputs)
    with use_tower(model, "triton"):
        got = gradients(model, inputs)
        visual(model).requires_grad_(True)
        with pytest.raises(ValueError, match=r"^parameters of the vision tower: expected none that requires gradients"):
            gradients(model, inputs)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4, rtol=1e-3)


def test_extra_bytes_are_what_is_allocated():
    model = build_full("qwen2_5_vl").to(torch.bfloat16)

    def requested_bytes():  # the allocator's own count has up to 1 MiB more for each tensor
        gc.collect()
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    for free_original in (False, True):
        before = requested_bytes()
        handle = use_tower(model, "triton", free_original=free_original)
        assert requested_bytes() - before == handle.extra_bytes
        handle.remove()
        assert requested_bytes() == before


def test_hidden_states_and_other_modes():
    model = build_full("qwen3_vl").to(torch.bfloat16)
    inputs = inputs_on_gpu(model)
    arguments = (inputs["pixel_values"], inputs["image_grid_thw"])
    with use_tower(model, "triton"), torch.no_grad():
        plain = visual(model)(*arguments)
        recorded = visual(model)(*arguments, output_hidden_states=True)
        assert len(recorded.hidden_states) == 5
        assert torch.equal(recorded.pooler_output, plain.pooler_output)  # in 16 bits graphs change no bit
        with torch.inference_mode():
            assert torch.equal(visual(model)(*arguments).pooler_output, plain.pooler_output)
        with torch.autocast("cuda", torch.float16):
            assert torch.equal(visual(model)(*arguments).pooler_output, plain.pooler_output)
        compiled = torch.compile(model, backend="eager")
        difference = log_probabilities(compiled, inputs) - log_probabilities(model, inputs)
        assert difference.abs().max() <= LOG_PROBABILITY_BOUND


def test_a_model_moved_since():
    model = build_full("qwen2_vl")
    inputs = inputs_on_gpu(model)
    with use_tower(model, "triton"):
        log_probabilities(model, inputs)
        moved = copy.deepcopy(inputs)
        model.cpu()
        with pytest.raises(ValueError, match=r"^hidden_states: expected pixel values on the tower's cuda:0, got cpu"):
            log_probabilities(model, {name: tensor.cpu() for name, tensor in moved.items()})
        model.cuda()
        model.half()
        with pytest.raises(ValueError, match=r"^model: its vision tower was moved, converted, loaded or adapted after"):
            log_probabilities(model, inputs)
