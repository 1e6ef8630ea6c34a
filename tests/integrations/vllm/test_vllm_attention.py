"""Attention mode, in stand-ins for vLLM's attention, against fp64."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qwenvit import ops
from qwenvit.integrations.vllm.attention import WHOLE_FRAMES, use_attention
from support.errors import error
from support.rope_attention_cases import DEVICE, HEAD_DIMS, angles, boundaries, poisoned
from support.towers import narrow
from support.vllm_attention import Block, Linear, Qwen2_5_VisionAttention, Qwen2VisionAttention, Tower

WIDTH, HEADS = 96, 2
KINDS = {
    "qwen2_vl": lambda head_dim: Qwen2VisionAttention(WIDTH, HEADS, head_dim),
    "qwen2_vl, rank 1 of 2": lambda head_dim: rank_1(Qwen2VisionAttention(WIDTH, HEADS, head_dim, ranks=2)),
    "qwen2_5_vl and later": lambda head_dim: Qwen2_5_VisionAttention(WIDTH, HEADS, head_dim),
}
BOUNDS = [0, 64, 128, 132, 164]


def rank_1(attention):
    attention.rank = 1
    return attention


def config(depth=1, **fields):
    """Return a config, of which only the depth and the windows matter here."""
    return narrow("qwen2_5_vl", depth=depth, **fields)


def tower(*attentions):
    torch.manual_seed(0)
    return Tower(*attentions).to(DEVICE).requires_grad_(False)


def arguments(bounds, head_dim, dtype=torch.float32, tokens=None, later=True):
    """Return what vLLM's towers give a block, with `sequence_lengths` as Qwen2.5-VL and later have it."""
    cos, sin = angles(tokens or bounds[-1], head_dim, half=dtype)
    given = {"cu_seqlens": boundaries(bounds), "rotary_pos_emb_cos": cos, "rotary_pos_emb_sin": sin}
    return given | {"max_seqlen": None} | ({"sequence_lengths": None} if later else {})


def hidden_states(tokens=BOUNDS[-1]):
    return torch.randn(tokens, 1, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("full", [False, True], ids=["windows", "frames"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_of_vllm(kind, head_dim, full, impl):
    visual = tower(KINDS[kind](head_dim))
    x, given = hidden_states(), arguments(BOUNDS, head_dim, later="later" in kind)
    expected = visual.blocks[0](x, **given)
    use_attention(visual, config(fullatt_block_indexes=(0,) if full else ()), impl)
    with poisoned():
        actual = visual.blocks[0](x, **given)
    assert actual.shape == x.shape
    assert error(actual, expected) < 1e-5
    given["rotary_pos_emb_sin"] = 1.02 * given["rotary_pos_emb_sin"]
    assert error(visual.blocks[0](x, **given), expected) > 1e-4


@pytest.fixture
def calls(monkeypatch):
    """The arguments of the operation's calls."""
    seen, attend = [], ops.rope_attention

    def spy(*args, **options):
        seen.append(SimpleNamespace(q=args[0], cos=args[3], max_seqlen=args[6], impl=options["impl"]))
        return attend(*args, **options)

    monkeypatch.setattr(ops, "rope_attention", spy)
    return seen


def test_the_windows_of_the_config_choose_the_kernel(calls):
    """Neither the lengths of the batch do, nor the `max_seqlen` that vLLM computes."""
    visual = tower(*(Qwen2_5_VisionAttention(WIDTH, HEADS, 80) for _ in range(4)))
    use_attention(visual, config(4, window_size=112, fullatt_block_indexes=(1, 3)))
    for longest in (None, 4, torch.tensor(7)):
        calls.clear()
        for block in visual.blocks:
            block(hidden_states(20), **arguments([0, 4, 20], 80) | {"max_seqlen": longest})
        assert [call.max_seqlen for call in calls] == [64, WHOLE_FRAMES, 64, WHOLE_FRAMES]


def test_without_windows_every_block_attends_to_frames(calls):
    visual = tower(Qwen2VisionAttention(WIDTH, HEADS, 80))
    use_attention(visual, narrow("qwen2_vl", depth=1))
    visual.blocks[0](hidden_states(20), **arguments([0, 4, 20], 80, later=False))
    assert [call.max_seqlen for call in calls] == [WHOLE_FRAMES]


def test_nothing_is_copied_before_the_operation(calls):
    visual, given = tower(Qwen2_5_VisionAttention(WIDTH, HEADS, 72)), arguments(BOUNDS, 72)
    use_attention(visual, config(), "triton")
    qkv = []
    visual.blocks[0].attn.qkv.register_forward_hook(lambda *args: qkv.append(args[2][0]))
    visual.blocks[0](hidden_states(), **given)
    assert calls[0].q.untyped_storage().data_ptr() == qkv[0].untyped_storage().data_ptr()
    assert calls[0].cos.data_ptr() == given["rotary_pos_emb_cos"].data_ptr()
    assert calls[0].impl == "triton"


@pytest.mark.parametrize("full", [False, True], ids=["windows", "frames"])
def test_the_capacity_of_a_cuda_graph(full):
    """Empty segments at the end, and rows that belong to none, as in vLLM's encoder graphs."""
    visual = tower(Qwen2_5_VisionAttention(WIDTH, HEADS, 72))
    use_attention(visual, config(fullatt_block_indexes=(0,) if full else ()), "triton")
    x = hidden_states(200)
    expected = visual.blocks[0](x[:132], **arguments([0, 64, 128, 132], 72))
    x[132:] = torch.nan
    with poisoned():
        actual = visual.blocks[0](x, **arguments([0, 64, 128] + [132] * 30, 72, tokens=200))
    assert error(actual[:132], expected) < 1e-6  # the products with the weights round otherwise


def test_linears_that_are_wrapped_later_take_part():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, torch.randn(base.in_features, base.out_features) / 10

        def forward(self, x):
            return self.base(x)[0] + x @ self.down.to(x.device), None

    visual, given = tower(Qwen2_5_VisionAttention(WIDTH, HEADS, 80)), arguments(BOUNDS, 80)
    plain = tower(Qwen2_5_VisionAttention(WIDTH, HEADS, 80))
    names = set(visual.state_dict())
    use_attention(visual, config())
    assert set(visual.state_dict()) == names
    plain.load_state_dict(visual.state_dict())
    for name in ("qkv", "proj"):
        adapted = Adapted(getattr(visual.blocks[0].attn, name))
        setattr(visual.blocks[0].attn, name, adapted)
        setattr(plain.blocks[0].attn, name, adapted)
    expected = plain.blocks[0](hidden_states(), **given)
    assert error(visual.blocks[0](hidden_states(), **given), expected) < 1e-5


def test_what_vllm_reads_of_its_attention_stays():
    attention = Qwen2_5_VisionAttention(WIDTH, HEADS, 64)
    attention.apply_rotary_emb = nn.Identity()  # vLLM's warm-up calls it
    use_attention(tower(attention), config())
    assert isinstance(attention, Qwen2_5_VisionAttention)
    assert (attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head) == (HEADS, 64)
    assert attention.apply_rotary_emb(3) == 3


def test_blocks_compile_to_one_graph_whatever_their_windows(calls):
    """vLLM compiles one block, and runs its code for all of them with their own tensors."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    visual, given = tower(*(Qwen2_5_VisionAttention(WIDTH, HEADS, 72) for _ in range(2))), arguments(BOUNDS, 72)
    use_attention(visual, config(2, fullatt_block_indexes=(1,)), "reference")
    for block in visual.blocks:
        expected = block(hidden_states(), **given)
        actual = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)(hidden_states(), **given)
        assert error(actual, expected) < 1e-6
    assert [call.max_seqlen for call in calls] == [64, 64, WHOLE_FRAMES, WHOLE_FRAMES]
    assert len({graph.code for graph in graphs}) == 1
    operation = next(node for node in graphs[0].graph.nodes if "attend_in_vllm" in str(node.target))
    assert operation.args[6].op == "placeholder"
    torch._dynamo.reset()


def test_the_registered_operation_passes_opcheck():
    q, k, v = torch.randn(3, 20, HEADS, 64, device=DEVICE)
    given = (*angles(20, 64, half=torch.float32), boundaries([0, 4, 20]), torch.tensor(64), 0.125)
    for impl in ("reference", "triton"):
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # it has no gradients
        torch.library.opcheck(torch.ops.qwenvit.attend_in_vllm.default, (q, k, v, *given, impl), test_utils=tests)


def test_images_in_rows_of_a_batch_are_refused():
    visual = tower(Qwen2_5_VisionAttention(WIDTH, HEADS, 64))
    use_attention(visual, config())
    with pytest.raises(ValueError, match=r"^x: expected images packed into one sequence \[S, 1, C\], got \[10, 2, 96"):
        visual.blocks[0](hidden_states(20).view(10, 2, WIDTH), **arguments([0, 10], 64))


class TestRefusals:
    def refused(self, message, visual, *options, depth=1):
        before = [type(block.attn) for block in getattr(visual, "blocks", ())]
        with pytest.raises(ValueError, match=f"^{message}"):
            use_attention(visual, config(depth), *options)
        assert [type(block.attn) for block in getattr(visual, "blocks", ())] == before

    def attention(self, head_dim=80, **changes):
        attention = Qwen2_5_VisionAttention(WIDTH, HEADS, head_dim)
        for name, value in changes.items():
            setattr(attention.attn, name, value)
        return attention

    def test_an_unknown_impl(self):
        self.refused("impl: expected 'auto', 'triton' or 'reference', got 'fast'", tower(self.attention()), "fast")

    def test_another_tower(self):
        self.refused("visual: expected a tower with 1 blocks as its config has, got 0", nn.Linear(2, 2))
        self.refused("visual: expected a tower with 2 blocks .* got 1", tower(self.attention()), depth=2)

    def test_another_attention(self):
        message = r"visual: expected blocks with an attention of Qwen2VisionAttention, Qwen2_5_VisionAttention, got "
        self.refused(f"{message}Linear", tower(Linear(2, 2)))
        visual = tower(self.attention())
        visual.blocks.append(nn.Identity())
        with pytest.raises(ValueError, match=f"^{message}NoneType"):
            use_attention(visual, config(2))
        assert type(visual.blocks[0].attn) is Qwen2_5_VisionAttention

    def test_other_arguments(self):
        class Changed(Qwen2_5_VisionAttention):
            def forward(self, x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, mask):
                raise NotImplementedError

        Changed.__name__ = "Qwen2_5_VisionAttention"
        message = r"visual: expected a Qwen2_5_VisionAttention called with x, .*sequence_lengths, got \('x', .*'mask'"
        self.refused(message, tower(Changed(WIDTH, HEADS, 80)))

    def test_heads_of_another_width(self):
        self.refused(r"visual: expected heads of \(64, 72, 80\) channels, got 16", tower(self.attention(16)))

    @pytest.mark.parametrize("backend", ["FLASHINFER", SimpleNamespace(name="FLASHINFER")], ids=["name", "enum"])
    def test_offsets_that_count_elements(self, backend):
        message = "visual: expected cu_seqlens that count tokens, got mm_encoder_attn_backend='FLASHINFER'"
        self.refused(message, tower(self.attention(attn_backend=backend)))

    def test_fp8(self):
        message = "visual: expected attention in the model's dtype, got mm_encoder_attn_dtype='fp8'"
        self.refused(message, tower(self.attention(fp8_enabled=True)))

    def test_twice_and_the_last_block_alone(self):
        visual = tower(self.attention(), self.attention())
        use_attention(visual, config(2))
        self.refused("visual: expected vLLM's own attention, got one that use_attention has replaced", visual, depth=2)
        visual = tower(self.attention(), self.attention(16))
        self.refused("visual: expected heads of", visual, depth=2)
        assert isinstance(visual.blocks[0], Block)
