"""use_tower on tiny models of transformers: what they compute with it, what it refuses, and what it leaves behind."""

import copy
import functools
import inspect
import pickle
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import vision_utils
from transformers.models.colqwen2 import ColQwen2Config, ColQwen2ForRetrieval

from qwenvit.integrations.transformers import loaded_tower, use_qwenvit, use_tower
from qwenvit.integrations.transformers import tower as integration
from qwenvit.towers.fast import FastTower
from qwenvit.towers.reference import ReferenceTower
from support.pinned import needs_pinned_transformers
from support.tiny_models import CLASSES, IMAGE, TEXT, base, build_wide, inputs_for, is_omni, processor, visual

LOG_PROBABILITY_BOUND = 1e-4
BATCHES = {
    "an image": [[("text", 3), ("image", (1, 6, 10)), ("text", 4)]],
    "a video": [[("text", 3), ("video", (3, 4, 6)), ("text", 4)]],
    "both": [
        [
            ("text", 2),
            ("image", (1, 4, 4)),
            ("text", 3),
            ("video", (2, 4, 4)),
            ("text", 2),
            ("image", (1, 10, 2)),
            ("text", 1),
        ],
        [("text", 2), ("image", (1, 6, 4)), ("text", 3)],
    ],
    "none": [[("text", 5)], [("text", 9)]],
}
ATTENTION = ("blocks.0.attn.qkv.weight", "blocks.0.attn.q.weight")


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: at these sizes, several threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models():
    return {family: build_wide(family) for family in CLASSES}


@pytest.fixture(params=CLASSES)
def model(request, models):
    """A model of each family; the test must leave it bitwise as it was."""
    model = models[request.param]
    before = snapshot(model)
    yield model
    assert_unchanged(model, before)


@pytest.fixture
def qwen2_5(models):
    """Qwen2.5-VL's model, of whose weights the fast tower packs the most."""
    model = models["qwen2_5_vl"]
    before = snapshot(model)
    yield model
    assert_unchanged(model, before)


@pytest.fixture(params=["reference", "fast"])
def impl(request, monkeypatch):
    """The implementation to ask for; the fast tower's operations are plain torch's, so that it runs on the CPU."""
    if request.param == "fast":
        fast_tower(monkeypatch)
        return "triton"
    return "reference"


@pytest.fixture
def fast(monkeypatch):
    return fast_tower(monkeypatch)


def fast_tower(monkeypatch):
    monkeypatch.setattr(integration, "tower_class", lambda *_: functools.partial(FastTower, impl="reference"))
    return "triton"


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return state, flags, attributes(visual(model)), list(model.parameters())


def attributes(module):
    return set(vars(module)) - {"_output_capturing_hooks_installed"}


def assert_unchanged(model, before):
    state, flags, names, parameters = before
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert attributes(visual(model)) == names
    assert all(left is right for left, right in zip(model.parameters(), parameters, strict=True))


@torch.no_grad()
def log_probabilities(model, inputs, **options):
    base(model).rope_deltas = None
    return model(**inputs, **options).logits.log_softmax(-1)


def generate(model, inputs, **options):
    base(model).rope_deltas = None
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=LOG_PROBABILITY_BOUND, rtol=0)


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


class TestRemoval:
    def test_remove(self, model, impl):
        tower = visual(model)
        handle = use_tower(model, impl)
        assert "forward" in vars(tower)
        ours = weakref.ref(handle.tower)
        handle.remove()
        assert "forward" not in vars(tower)
        assert (ours(), handle.tower) == (None, None)  # its memory is released, without a collector of cycles
        with use_tower(model, impl):
            handle.remove()  # an old handle does not undo a new replacement
            assert "forward" in vars(tower)

    def test_weights_of_two_states_are_told(self, fast):
        for write in ("load", "scale"):
            model = build_wide("qwen3_vl")
            before = {name: weight.clone() for name, weight in model.state_dict().items()}
            handle = use_tower(model, fast, free_original=True)
            if write == "load":
                with pytest.raises(RuntimeError, match="size mismatch"):
                    model.load_state_dict(build_wide("qwen3_vl", depth=3).state_dict())
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(2)
            with pytest.raises(ValueError, match=r"^model: weights were loaded or changed while use_tower had freed"):
                handle.remove()
            handle.remove()  # nothing is left to undo
            assert handle.tower is None
            assert "forward" not in vars(visual(model))
            assert all(weight.shape == before[name].shape for name, weight in model.state_dict().items())

    def test_autocast_around_a_fast_tower(self, fast):
        model = build_wide("qwen3_vl")
        inputs = inputs_for(model, BATCHES["an image"])
        call = functools.partial(visual(model), inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        asked = pytest.raises(ValueError, match=r"^autocast: expected none around")
        with use_tower(model, fast), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), asked:
            call()
        with use_tower(model.bfloat16(), fast), torch.no_grad():
            for hidden_states in (False, True):  # weights in 16 bits: whatever autocast says
                expected = call(output_hidden_states=hidden_states).pooler_output
                with torch.autocast("cpu", torch.float16):
                    assert torch.equal(call(output_hidden_states=hidden_states).pooler_output, expected)

    def test_positions_that_were_removed_by_hand(self, fast):
        model = build_wide("qwen3_vl")
        handle = use_qwenvit(model, fast)
        del base(model).get_rope_index
        handle.remove()
        assert "forward" not in vars(visual(model))

    def test_an_exception_in_the_block(self, model, impl):
        with pytest.raises(KeyError), use_tower(model, impl, free_original=True):
            raise KeyError
        assert "forward" not in vars(visual(model))

    def test_a_failure_while_packing(self, qwen2_5, fast, monkeypatch):
        def fail(*_):
            raise MemoryError

        monkeypatch.setattr("qwenvit.towers.fast.pad_columns", fail)
        with pytest.raises(MemoryError):
            use_qwenvit(qwen2_5, fast, free_original=True)
        assert "get_rope_index" not in vars(qwen2_5.model)

    def test_twice(self, qwen2_5, impl):
        with use_tower(qwen2_5, impl):
            with pytest.raises(
                ValueError, match=r"^model: expected its own vision tower, got a replaced one; call rem"
            ):
                use_tower(qwen2_5, impl)
            assert "forward" in vars(visual(qwen2_5))

    def test_a_forward_that_was_replaced_after_ours(self, qwen2_5):
        handle = use_tower(qwen2_5)
        ours = visual(qwen2_5).forward
        visual(qwen2_5).forward = lambda *_: None
        with pytest.raises(ValueError, match="was replaced after use_tower; undo that first"):
            handle.remove()
        visual(qwen2_5).forward = ours
        handle.remove()

    @pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_copies(self, qwen2_5, way):
        with use_tower(qwen2_5), pytest.raises(TypeError, match="copied or pickled while use_tower is in effect"):
            way(qwen2_5 if way is copy.deepcopy else visual(qwen2_5).forward)
        copy.deepcopy(qwen2_5)

    def test_positions_stay_the_models_own_if_the_tower_is_refused(self, qwen2_5):
        hook = visual(qwen2_5).merger.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="hooks"):
            use_qwenvit(qwen2_5)
        hook.remove()
        assert "get_rope_index" not in vars(qwen2_5.model)


class TestMemory:
    def test_the_reference_tower_shares_the_models_parameters(self, model):
        with use_tower(model, "reference", free_original=True) as handle:
            assert handle.extra_bytes == 0
            assert {id(p) for p in handle.tower.parameters()} == {id(p) for p in visual(model).parameters()}

    def test_the_fast_tower_shares_what_it_does_not_pack(self, model, fast):
        theirs = {p.untyped_storage().data_ptr() for p in visual(model).parameters()}
        with use_tower(model, fast) as handle:
            packed = [p for p in handle.tower.parameters() if p.untyped_storage().data_ptr() not in theirs]
            assert handle.extra_bytes == sum(p.nbytes for p in packed) > 0
            shared = {name for name, p in handle.tower.named_parameters() if all(p is not other for other in packed)}
            assert {"blocks.0.attn.proj.weight", "blocks.0.norm1.weight", "merger.fc1.weight"} <= shared

    def test_freed_weights(self, model, fast, tmp_path):
        own, inputs = visual(model), inputs_for(model, BATCHES["both"])
        expected, state = log_probabilities(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
        prefix = next(name for name, module in model.named_modules() if module is own) + "."
        bytes_before = sum(p.nbytes for p in own.parameters())
        with use_tower(model, fast, free_original=True) as handle:
            assert (own.dtype, own.device) == (torch.float32, torch.device("cpu"))
            freed = bytes_before - sum(p.nbytes for p in own.parameters())
            assert freed > 3 * own.blocks[0].attn.proj.weight.nbytes
            held = {p.untyped_storage().data_ptr(): p.nbytes for p in (*own.parameters(), *handle.tower.parameters())}
            assert sum(held.values()) == bytes_before + handle.extra_bytes
            assert_close(log_probabilities(model, inputs), expected)
            saved = model.state_dict()
            assert list(saved) == list(state)
            assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
            assert all(torch.equal(t, state[prefix + n]) for n, t in own.state_dict().items())
            model.save_pretrained(tmp_path)
        for parameter in own.parameters():
            assert parameter.is_contiguous()
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
        with torch.random.fork_rng():
            loaded = type(model).from_pretrained(tmp_path)
        assert torch.equal(log_probabilities(loaded.eval(), inputs), expected)

    def test_saving_keeps_the_original_names(self, model, impl, tmp_path):
        model.save_pretrained(tmp_path / "own")
        with use_tower(model, impl):
            model.save_pretrained(tmp_path / "replaced")
        own, replaced = (load_file(tmp_path / kind / "model.safetensors") for kind in ("own", "replaced"))
        assert own.keys() == replaced.keys()
        assert all(torch.equal(own[name], replaced[name]) for name in own)


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

        def gradients():
            model.zero_grad(set_to_none=True)
            base(model).rope_deltas = None
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

        expected = gradients()
        with use_tower(model, impl):
            got = gradients()
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
