"""RoPE and attention against fp64, within plain torch's error: on a GPU, or without one in Triton's interpreter."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from qwenvit import ops
from support.rope_attention_cases import (
    DEVICE,
    DTYPES,
    HEAD_DIMS,
    angles,
    assert_close_to_truth,
    boundaries,
    error,
    packed,
    poisoned,
    truth,
)

torch.manual_seed(0)
WINDOWS = [0, 64, 128, 132, 136, 164]  # whole windows, and partial ones down to one merge unit of 4 patches
RAGGED = [0, 1, 1, 1, 65, 129, 192, 195, 195]
MIXED = {"windows": (WINDOWS, 64), "ragged": (RAGGED, None), "one": ([0, 150], None), "max_seqlen too low": (RAGGED, 4)}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_further_from_the_truth_than_torch(dtype, head_dim, case, interleaved):
    bounds, max_seqlen = MIXED[case]
    assert_close_to_truth(packed(bounds[-1], 3, head_dim, dtype), bounds, max_seqlen, interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("case", ["windows", "ragged", "max_seqlen too low"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angles_of_half_the_width_in_the_dtype_of_the_queries(dtype, head_dim, case, interleaved):
    bounds, max_seqlen = MIXED[case]
    assert_close_to_truth(packed(bounds[-1], 2, head_dim, dtype), bounds, max_seqlen, interleaved, half=dtype)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("max_seqlen", [64, None], ids=["windows", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_angles_of_any_width_stride_and_dtype(dtype, max_seqlen, impl):
    """Only the first half of a row is read, and 16-bit angles are those of fp32 that they equal."""
    q, k, v = packed(164, 3, 72, dtype)
    bounds = boundaries(WINDOWS)

    def attend(cos, sin):
        return ops.rope_attention(q, k, v, cos, sin, bounds, max_seqlen, impl=impl)

    cos, sin = (x.to(dtype).float() for x in angles(164, 72))
    expected = attend(cos, sin)
    half_cos, half_sin = cos[:, :36].contiguous(), sin[:, :36].contiguous()
    wide = torch.full((164, 200), torch.nan, device=DEVICE)
    wide[:, 1:37], wide[:, 100:136] = half_cos, half_sin
    forms = {
        "half": (half_cos, half_sin),
        "in the dtype of the queries": (half_cos.to(dtype), half_sin.to(dtype)),
        "whole, in the dtype of the queries": (cos.to(dtype), sin.to(dtype)),
        "views": (wide[:, 1:37], wide[:, 100:136]),
        "one a view": (half_cos, wide[:, 100:136]),
        "the other a view": (wide[:, 1:37], half_sin),
    }
    for name, form in forms.items():
        assert torch.equal(attend(*form), expected), name


@pytest.mark.parametrize("rotate", [False, True], ids=["rotated before", "rotated here"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("max_seqlen", [64, None], ids=["windows", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_values_with_ones_beside_them(dtype, max_seqlen, impl, rotate):
    """As a packed projection has them, whose rows other numbers surround."""
    q, k, v = packed(164, 3, 72, dtype)
    memory = torch.full((164, 2 * 216 + 3 * 80 + 16), torch.nan, device=DEVICE, dtype=dtype)
    padded = memory[:, 432:672].unflatten(1, (3, 80))
    padded[..., :72], padded[..., 72:] = v, 1
    others = *(angles(164, 72) if rotate else (None, None)), boundaries(WINDOWS), max_seqlen
    expected = ops.rope_attention(q, k, v, *others, interleaved=True, impl=impl)
    assert expected.isfinite().all()
    assert torch.equal(ops.rope_attention(q, k, padded, *others, interleaved=True, impl=impl), expected)


@pytest.mark.parametrize("max_seqlen", [64, None], ids=["windows", "long"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotated_before(head_dim, max_seqlen):
    for bounds in (WINDOWS, RAGGED):
        assert_close_to_truth(packed(bounds[-1], 2, head_dim, DTYPES[-1]), bounds, max_seqlen, rotate=False)


@pytest.mark.parametrize("max_seqlen", [64, None], ids=["windows", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, max_seqlen):
    """Q, K and V may be transposed, unaligned, expanded, and of different strides."""
    bounds = [0, 6, 70, 134]
    q = torch.randn(3, 134, 72, device=DEVICE).to(dtype).transpose(0, 1)
    k = torch.randn(134, 3 * 72 + 1, device=DEVICE).to(dtype)[:, 1:].unflatten(1, (3, 72))
    v = torch.randn(134, 3, 80, device=DEVICE).to(dtype)[..., 3:75]
    assert_close_to_truth((q, k, v), bounds, max_seqlen)
    expanded = q[:, :1].expand(134, 3, 72)
    assert_close_to_truth((expanded, expanded, v), bounds, max_seqlen)


@pytest.mark.parametrize("max_seqlen", [64, None], ids=["windows", "long"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_segment_does_not_depend_on_its_neighbours(dtype, max_seqlen):
    """It has the same bits alone and among others, even if those are infinite or NaN."""
    q, k, v = (x.clone() for x in packed(200, 2, 72, dtype))
    cos, sin = angles(200, 72)
    bounds = [0, 10, 70, 199, 200]
    for x in (q, k, v):
        x[:10], x[70], x[199] = float("inf"), float("nan"), float("-inf")
    out = ops.rope_attention(q, k, v, cos, sin, boundaries(bounds), max_seqlen, impl="triton")
    own = (x[10:70] for x in (q, k, v, cos, sin))
    alone = ops.rope_attention(*own, boundaries([0, 60]), max_seqlen, impl="triton")
    assert alone.isfinite().all()
    assert torch.equal(out[10:70], alone)


@pytest.mark.parametrize("max_seqlen", [64, None], ids=["windows", "long"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_spare_segments_and_rows(head_dim, max_seqlen):
    """A CUDA graph's capacity: empty segments at the end, and rows that belong to none, whatever they contain."""
    q, k, v = (x.clone() for x in packed(150, 2, head_dim, DTYPES[-1]))
    cos, sin = angles(150, head_dim, half=DTYPES[-1])
    own = [x[:103] for x in (q, k, v, cos, sin)]
    expected = ops.rope_attention(*own, boundaries([0, 64, 100, 103]), max_seqlen, impl="triton")
    for x in (q, k, v, cos, sin):
        x[103:] = torch.nan
    with poisoned():
        spare = boundaries([0, 64, 100] + [103] * 40)
        out = ops.rope_attention(q, k, v, cos, sin, spare, max_seqlen, impl="triton")
    assert torch.equal(out[:103], expected)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.sampled_from([0, 1, 4, 16, 31, 32, 33, 63, 64, 65, 96, 100]), min_size=1, max_size=6),
    max_seqlen=st.sampled_from([None, 0, 64, 1000]),
    scale=st.sampled_from([None, 0.01, 0.2]),
)
def test_any_lengths(lengths, max_seqlen, scale):
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert_close_to_truth(packed(bounds[-1], 1, 64, torch.float32, outliers=False), bounds, max_seqlen, scale=scale)


def test_no_tokens():
    empty = torch.empty(0, 2, 64, device=DEVICE)
    for bounds in ([0], [0, 0, 0]):
        out = ops.rope_attention(empty, empty, empty, None, None, boundaries(bounds), impl="triton")
        assert out.shape == (0, 2, 64)


def test_auto_is_the_reference_on_a_cpu():
    q, k, v = packed(20, 2, 64, torch.float32, "cpu")
    arguments = (q, k, v, *angles(20, 64, "cpu"), torch.tensor([0, 20], dtype=torch.int32))
    assert torch.equal(ops.rope_attention(*arguments), ops.rope_attention(*arguments, impl="reference"))


def test_the_registered_operation_passes_opcheck():
    q, k, v = packed(20, 2, 64, torch.float32)
    cu_seqlens = boundaries([0, 4, 20])
    ops.rope_attention(q, k, v, None, None, cu_seqlens, impl="triton")  # registers the operation
    for half in (None, torch.float32):
        arguments = (q, k, v, *angles(20, 64, half=half), cu_seqlens, 64, 0.125, False)
        torch.library.opcheck(torch.ops.qwenvit.rope_attention.default, arguments)
    q, k, v = packed(20, 2, 72, torch.float32)
    v = torch.nn.functional.pad(v, (0, 8), value=1.0)
    torch.library.opcheck(torch.ops.qwenvit.rope_attention.default, (q, k, v, None, None, cu_seqlens, None, 0.1, True))


def test_mistakes_exceed_the_tolerance():
    """Mistakes that such a kernel could make are all far outside the tolerance."""
    bounds = [0, 30, 94]
    q, k, v = packed(94, 1, 80, torch.float32)
    cos, sin = angles(94, 80)
    cu_seqlens = boundaries(bounds)
    right = truth(q, k, v, cos, sin, bounds)
    with poisoned():
        good = ops.rope_attention(q, k, v, cos, sin, cu_seqlens, impl="triton")
    limit = 1e-5
    assert error(good, right) < limit
    mistakes = {
        "sine negated": truth(q, k, v, cos, -sin, bounds),
        "keys not rotated": truth(q, k, v, cos, sin, bounds, rotate_keys=False),
        "other pairs": truth(q, k, v, cos, sin, bounds, interleaved=True),
        "scale off by 2 %": truth(q, k, v, cos, sin, bounds, scale=1.02 * 80**-0.5),
        "a boundary off by one": truth(q, k, v, cos, sin, [0, 31, 94]),
        "one segment": truth(q, k, v, cos, sin, [0, 94]),
        "last channel lost": truth(q, k, torch.cat((v[..., :79], 0 * v[..., 79:]), -1), cos, sin, bounds),
    }
    for mistake, wrong in mistakes.items():
        assert error(wrong, right) > 100 * limit, mistake


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": torch.zeros(20, 2, 96)}, ValueError, "q: expected shape"),
        ({"q": torch.zeros(20, 128)}, ValueError, "q: expected shape"),
        ({"q": torch.zeros(20, 2, 64, dtype=torch.int8)}, TypeError, "q: expected a float32, bfloat16 or float16"),
        ({"k": torch.zeros(20, 2, 64).half()}, TypeError, "k: expected torch.float32"),
        ({"k": torch.zeros(20, 1, 64)}, ValueError, "k: expected"),
        ({"v": torch.zeros(20, 64, 2).transpose(1, 2)}, ValueError, "v: expected an inner stride of 1"),
        ({"v": torch.zeros(20, 2, 80)}, ValueError, r"v: expected \[20, 2, 64\]"),
        ({"k": torch.zeros(20, 2, 80)}, ValueError, r"k: expected \[20, 2, 64\]"),
        (
            {"q": torch.zeros(20, 2, 72), "k": torch.zeros(20, 2, 80), "v": torch.zeros(20, 2, 80)},
            ValueError,
            r"k: expected \[20, 2, 72\]",
        ),
        ({"cos": None}, ValueError, "cos, sin: expected two"),
        ({"cos": torch.zeros(20, 48)}, ValueError, r"cos: expected shape \[20, 32\] or \[20, 64\], got \[20, 48\]"),
        ({"cos": torch.zeros(19, 64)}, ValueError, r"cos: expected shape \[20, 32\] or \[20, 64\], got \[19, 64\]"),
        ({"cos": torch.zeros(20, 32)}, ValueError, "cos, sin: expected one shape and dtype, got .* 32.* 64"),
        ({"sin": torch.zeros(20, 64).half()}, TypeError, r"sin: expected a float32 tensor .* got torch\.float16"),
        (
            {name: torch.zeros(20, 2, 64).half() for name in "qkv"} | {"sin": torch.zeros(20, 64).bfloat16()},
            TypeError,
            r"sin: expected a float32 or torch\.float16 tensor .* got torch\.bfloat16",
        ),
        (
            {name: torch.zeros(20, 2, 64).half() for name in "qkv"} | {"sin": torch.zeros(20, 64).half()},
            ValueError,
            r"cos, sin: expected one shape and dtype, got torch\.float32 .* torch\.float16",
        ),
        ({"cu_seqlens": torch.tensor([0, 20])}, TypeError, r"cu_seqlens: expected torch\.int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, "cu_seqlens: expected"),
        ({"cu_seqlens": [0, 20]}, TypeError, r"cu_seqlens: expected a torch\.Tensor, got list"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen: expected"),
        ({"max_seqlen": 64.0}, ValueError, "max_seqlen: expected"),
        ({"scale": 0.0}, ValueError, "scale: expected"),
        ({"impl": "cuda"}, ValueError, "impl: expected"),
        *(
            ({name: torch.zeros(20, 2, 64, requires_grad=True)}, ValueError, "impl: 'triton' means Triton here")
            for name in "qkv"
        ),
    ],
)
def test_bad_input_is_named(change, kind, message):
    good = {name: torch.zeros(20, 2, 64) for name in "qkv"} | {"cos": torch.zeros(20, 64), "sin": torch.zeros(20, 64)}
    good |= {"cu_seqlens": torch.tensor([0, 20], dtype=torch.int32), "impl": "triton"}
    with pytest.raises(kind, match=message):
        ops.rope_attention(**(good | change))


def test_the_reference_checks_cu_seqlens():
    q = torch.zeros(20, 2, 64)
    with pytest.raises(ValueError, match="cu_seqlens: expected to rise from 0 to 20"):
        ops.rope_attention(q, q, q, None, None, torch.tensor([0, 21], dtype=torch.int32), impl="reference")
