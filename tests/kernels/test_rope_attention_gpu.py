"""RoPE and attention on a GPU at the models' shapes: difficult `cu_seqlens`, every dtype, and bit for bit."""

import pytest
import torch

from qwenvit import ops
from support.rope_attention_cases import (
    DTYPES,
    HEAD_DIMS,
    angles,
    assert_close_to_truth,
    boundaries,
    error,
    packed,
    poisoned,
    rotate,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _ieee_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


def mixed_lengths(total, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = []
    while (remaining := total - sum(lengths)) > 0:
        longest = (1, 8, 200, 3000)[int(torch.randint(4, (), generator=generator))]
        lengths.append(min(remaining, int(torch.randint(longest + 1, (), generator=generator))))
    return lengths


WINDOWS = {
    "448 px": [64] * 16,
    "odd grid": [64, 64, 48, 64, 64, 48, 32, 32, 24, 4, 16, 8] * 7,
    "1344 px": [64] * 144,
    "1024 windows": [64] * 1024,
    "empty and single": [0, 1, 0, 0, 64, 1, 63, 0],
}
LONG = {
    "448 px": [1024],
    "1344 px": [9216],
    "frames": [784] * 6,
    "mixed": mixed_lengths(6000),
    "windows": [64] * 40 + [4, 12],
    "single": [1] * 300,
    "edges": [0, 1, 63, 64, 65, 127, 128, 129, 0, 0, 191, 192, 193, 0],
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows(dtype, head_dim, case, interleaved):
    bounds = cumulative(WINDOWS[case])
    heads = 16 if bounds[-1] < 10000 else 4
    assert_close_to_truth(packed(bounds[-1], heads, head_dim, dtype), bounds, 64, interleaved)


@pytest.mark.parametrize(("case", "max_seqlen"), [("odd grid", 64), ("mixed", None)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angles_of_half_the_width_in_the_dtype_of_the_queries(dtype, head_dim, case, max_seqlen):
    bounds = cumulative((WINDOWS | LONG)[case])
    assert_close_to_truth(packed(bounds[-1], 16, head_dim, dtype), bounds, max_seqlen, half=dtype)


@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long(dtype, head_dim, case):
    bounds = cumulative(LONG[case])
    heads = 16 if bounds[-1] < 9000 else 2
    assert_close_to_truth(packed(bounds[-1], heads, head_dim, dtype), bounds, None, interleaved=head_dim == 80)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_one_segment_of_65536(head_dim):
    """A sample of the queries is compared with fp64."""
    q, k, v = packed(65536, 1, head_dim, torch.bfloat16)
    cos, sin = angles(65536, head_dim)
    cu_seqlens = boundaries([0, 65536])
    sample = torch.arange(0, 65536, 97, device="cuda")
    wide_q, wide_k = rotate(q.double(), cos, sin, False)[sample, 0], rotate(k.double(), cos, sin, False)[:, 0]
    right = (wide_q @ wide_k.T * head_dim**-0.5).softmax(-1) @ v[:, 0].double()
    errors = {}
    for impl in ("triton", "reference"):
        with poisoned():
            out = ops.rope_attention(q, k, v, cos, sin, cu_seqlens, impl=impl)
        assert out.isfinite().all()
        errors[impl] = error(out[sample, 0], right)
    assert errors["triton"] <= 1.05 * errors["reference"], errors


@pytest.mark.parametrize(("lengths", "max_seqlen"), [([64] * 100, 64), (mixed_lengths(20000, seed=1), None)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_same_bits_again_and_alone(head_dim, dtype, lengths, max_seqlen):
    bounds = cumulative(lengths)
    q, k, v = packed(bounds[-1], 16, head_dim, dtype)
    cos, sin = angles(bounds[-1], head_dim)
    cu_seqlens = boundaries(bounds)
    first = ops.rope_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen)
    for _ in range(5):
        assert torch.equal(ops.rope_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen), first)
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    for i in {0, len(lengths) // 2, len(lengths) - 1, longest}:
        start, end = bounds[i], bounds[i + 1]
        if end > start:
            own = (x[start:end] for x in (q, k, v, cos, sin))
            alone = boundaries([0, end - start])
            assert torch.equal(ops.rope_attention(*own, alone, max_seqlen), first[start:end]), (i, end - start)


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["whole angles", "half"])
@pytest.mark.parametrize("max_seqlen", [64, None], ids=["windows", "long"])
def test_compiled_and_captured(max_seqlen, half):
    """torch.compile sees one operation, and a captured graph reads new `cu_seqlens` when it is replayed."""
    q, k, v = packed(192, 4, 80, torch.bfloat16)
    cos, sin = angles(192, 80, half=half)
    cu_seqlens = boundaries([0, 64, 128, 192])

    def attend(q, k, v):
        return ops.rope_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen) * 2

    eager = attend(q, k, v)
    assert torch.equal(torch.compile(attend, fullgraph=True)(q, k, v), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v)
    graph.replay()
    assert torch.equal(captured, eager)
    cu_seqlens.copy_(torch.tensor([0, 4, 60, 192]))
    graph.replay()
    assert torch.equal(captured, attend(q, k, v))
    assert not torch.equal(captured, eager)
