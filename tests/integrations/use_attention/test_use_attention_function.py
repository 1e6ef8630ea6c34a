"""The functions that use_attention registers with transformers: their names, and the arguments they take or refuse."""

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from qwenvit.integrations.transformers import attention as integration
from qwenvit.integrations.transformers import use_attention
from support.use_attention import DEVICE, assert_close, tiny_tower

SEGMENTS = (slice(0, 10), slice(10, 24))


def test_transformers_takes_the_names_for_no_version_of_flash_attention():
    for name in integration.NAMES.values():
        assert is_flash_attention_requested(requested_attention_implementation=name)
        for version in (2, 3, 4):
            assert f"flash_attention_{version}" not in name
            assert not name.endswith(str(version))


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
