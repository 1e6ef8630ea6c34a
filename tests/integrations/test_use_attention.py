"""use_attention on transformers' towers: its results, what it leaves alone, and what it refuses.

The truth is transformers' own attention, sdpa and eager. On a CPU, Triton runs in its interpreter.
"""

import copy
import functools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from common.hf_towers import build_tower, forward, seed_weights
from qwenvit.integrations.transformers import attention as integration
from qwenvit.integrations.transformers import use_attention, use_tower
from qwenvit.parity import close, no_worse
from support.tiny_models import CLASSES, build, inputs_for
from support.towers import FULL, MIXED_GRIDS, narrow, random_pixels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = MIXED_GRIDS if DEVICE == "cuda" else [[1, 8, 10], *MIXED_GRIDS[1:3]]  # the interpreter is slow
LOG_PROBABILITY_BOUND = 1e-4
SEGMENTS = (slice(0, 10), slice(10, 24))
BATCHES = {
    "an image": [[("text", 3), ("image", (1, 6, 10)), ("text", 4)]],
    "a video": [[("text", 3), ("video", (3, 4, 6)), ("text", 4)]],
    "both": [
        [("text", 2), ("image", (1, 4, 4)), ("text", 3), ("video", (2, 4, 4)), ("text", 1)],
        [("text", 2), ("image", (1, 6, 4)), ("text", 3), ("image", (1, 8, 2)), ("text", 1)],
    ],
}


@functools.cache
def build_wide(family):
    """Return a tiny model whose vision tower has two blocks of two heads as wide as those of published towers."""
    model = build(family, depth=2, **{"embed_dim" if family == "qwen2_vl" else "hidden_size": 128})
    seed_weights(visual(model), seed=0, outliers=False)
    return model


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: at these sizes, several threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(params=CLASSES)
def model(request):
    return build_wide(request.param)


@pytest.fixture
def qwen3():
    return build_wide("qwen3_vl")


@pytest.fixture
def calls(monkeypatch):
    """The queries of each call of our attention."""
    calls = []

    def spy(q, *arguments, **options):
        calls.append(q)
        return rope_attention(q, *arguments, **options)

    rope_attention = integration.ops.rope_attention
    monkeypatch.setattr(integration.ops, "rope_attention", spy)
    return calls


def visual(model):
    return model.model.visual if hasattr(model.model, "visual") else model.visual  # Omni's before transformers 5.23


def tower_inputs(config, grids=GRIDS):
    grid_thw = torch.tensor(grids)
    return random_pixels(int(grid_thw.prod(1).sum()), config).to(DEVICE), grid_thw.to(DEVICE)


def tiny_tower(family="qwen3_vl"):
    """Return a tower of two blocks in fp32, and its inputs."""
    config = narrow(family, depth=2)
    return build_tower(config, device=DEVICE), tower_inputs(config, [[1, 4, 6], [2, 4, 4]])


def implementations(model):
    """Return the name of the attention in every config of a model."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    return [(type(config).__name__, config._attn_implementation) for config in configs]


def assert_close(actual, expected):
    check = close("with use_attention", actual, expected)
    assert check.passed, check


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


def test_transformers_takes_the_names_for_no_version_of_flash_attention():
    for name in integration.NAMES.values():
        assert is_flash_attention_requested(requested_attention_implementation=name)
        for version in (2, 3, 4):
            assert f"flash_attention_{version}" not in name
            assert not name.endswith(str(version))


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


def test_a_rank_of_tensor_parallelism_has_fewer_heads():
    # A rank has some of the heads: the function takes their number from the tensor, not from the config.
    use_attention(tiny_tower()[0]).remove()  # registers the functions
    q, k, v = torch.randn(3, 1, 3, 24, 80, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    parts = [F.scaled_dot_product_attention(*(x[:, :, rows] for x in (q, k, v)), scale=0.2) for rows in SEGMENTS]
    cu_seqlens = torch.tensor([0, 10, 24], dtype=torch.int32, device=DEVICE)
    for impl, name in integration.NAMES.items():
        out, weights = ALL_ATTENTION_FUNCTIONS[name](None, q, k, v, None, **arguments(cu_seqlens, scaling=0.2))
        assert weights is None
        assert out.shape == (1, 24, 3, 80), impl
        assert_close(out, torch.cat(parts, 2).transpose(1, 2))


def arguments(cu_seqlens, **changes):
    """Return the keyword arguments that transformers' towers give an attention function."""
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 14, "max_length_k": 14}
    return {"scaling": 80**-0.5, "dropout": 0.0, "is_causal": False} | lengths | changes


def test_a_longest_length_on_the_gpu_as_transformers_5_3_gives_it():
    use_attention(tiny_tower()[0]).remove()
    q, k, v = torch.randn(3, 1, 2, 24, 80, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cu_seqlens = torch.tensor([0, 10, 24], dtype=torch.int32, device=DEVICE)
    attend = ALL_ATTENTION_FUNCTIONS["qwenvit_flash_triton"]
    expected, _ = attend(None, q, k, v, None, **arguments(cu_seqlens))
    actual, _ = attend(None, q, k, v, None, **arguments(cu_seqlens, max_length_q=cu_seqlens.diff().max()))
    assert torch.equal(actual, expected)


CU_SEQLENS = torch.tensor([0, 24], dtype=torch.int32)
QUERY = torch.zeros(1, 2, 24, 80)


@pytest.mark.parametrize(
    ("query", "mask", "changes", "message"),
    [
        (QUERY, torch.zeros(1, 1, 24, 24), {}, "attention_mask: expected None"),
        (QUERY, None, {"dropout": 0.1}, "dropout: expected 0, got 0.1"),
        (QUERY, None, {"is_causal": True}, "is_causal: expected False, got True"),
        (QUERY, None, {"is_causal": None}, "is_causal: expected False, got None"),
        (QUERY, None, {"cu_seq_lens_q": None, "cu_seq_lens_k": None}, "cu_seq_lens_q, cu_seq_lens_k: expected one"),
        (QUERY, None, {"cu_seq_lens_k": CU_SEQLENS.clone()}, "cu_seq_lens_q, cu_seq_lens_k: expected one"),
        (QUERY, None, {"output_attentions": True}, "output_attentions: expected none in a vision tower, got True"),
        (QUERY, None, {"sliding_window": 4}, "sliding_window: expected none in a vision tower, got 4"),
        (QUERY, None, {"softcap": 30.0}, "softcap: expected none in a vision tower, got 30"),
        (QUERY, None, {"s_aux": torch.ones(2)}, "s_aux: expected none in a vision tower, got tensor"),
        (
            QUERY.expand(2, -1, -1, -1),
            None,
            {},
            r"query: expected one packed sequence \[1, H, S, D\], got shape \[2, 2",
        ),
        (QUERY, None, {"scaling": -1.0}, "scale: expected None or a positive number"),
    ],
)
def test_an_unexpected_argument_of_a_call(query, mask, changes, message):
    use_attention(tiny_tower()[0]).remove()
    with pytest.raises(ValueError, match=f"^{message}"):
        ALL_ATTENTION_FUNCTIONS["qwenvit_flash"](None, query, query, query, mask, **arguments(CU_SEQLENS, **changes))


def test_dropout_and_attention_weights_are_refused_in_a_tower():
    tower, (pixels, grid_thw) = tiny_tower()
    with torch.no_grad(), use_attention(tower):
        with pytest.raises(ValueError, match=r"^output_attentions: expected none"):
            tower(pixels, grid_thw=grid_thw, output_attentions=True)
        tower.train()
        tower(pixels, grid_thw=grid_thw)  # published towers have no dropout
        tower.blocks[1].attn.attention_dropout = 0.1
        with pytest.raises(ValueError, match=r"^dropout: expected 0, got 0\.1"):
            tower(pixels, grid_thw=grid_thw)


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
