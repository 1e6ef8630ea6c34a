"""QKV projection with rotary embedding: the fused kernel, the pass in place, and packed weights, against fp64."""

# ruff: noqa: N803, N806
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenvit import ops
from qwenvit.kernels.gemm import qkv_rope as kernel
from qwenvit.kernels.gemm.cublas import MIN_ROWS
from qwenvit.kernels.gemm.tiles import Tile
from qwenvit.ops import reference
from qwenvit.ops.packing import adjacent_pairs, pack_qkv, unpack_qkv_rows, value_width
from qwenvit.plan.rope import apply_rope, rope_cos_sin
from support.errors import error, error_bound

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
SMALL_TILE = Tile(32, 64, 32, 4, 2, 1, band=2)


def make_inputs(M, H, D, K, dtype, seed=0):
    """Return x, weight, bias, cos and sin of one projection; some channels of x are 100 times larger than the rest."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g)
    x[:, :: max(K // 5, 1)] *= 100
    weight = torch.randn(3 * H * D, K, generator=g) * K**-0.5
    bias = torch.randn(3 * H * D, generator=g)
    cos, sin = rope_cos_sin(torch.randint(0, 200, (M, 2), generator=g), D, 10000.0)
    return [t.to(DEVICE, dtype) for t in (x, weight, bias)] + [cos.to(DEVICE), sin.to(DEVICE)]


def truth(x, weight, bias, cos, sin, H, interleaved=True):
    bias = None if bias is None else bias.double()
    qkv = F.linear(x.double(), weight.double(), bias)
    heads = qkv.unflatten(1, (3, H, -1)).clone()
    half = heads.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    c, s = cos[:, None, None, :half].double(), sin[:, None, None, :half].double()
    a, b = heads[:, :2, :, first].clone(), heads[:, :2, :, second].clone()
    heads[:, :2, :, first] = a * c - b * s
    heads[:, :2, :, second] = b * c + a * s
    return heads.flatten(1)


def torch_among_many_rows(x, weight, bias, cos, sin, H, interleaved):
    """Return the reference with `x` padded to MIN_ROWS, as cuBLAS gets it: sums of few rows may have another order."""
    x_rows, cos, sin = (F.pad(rows, (0, 0, 0, max(MIN_ROWS - len(x), 0))) for rows in (x, cos, sin))
    return reference.qkv_rope(x_rows, weight, bias, cos, sin, H, interleaved)[: len(x)]


def free_nan_memory(*shape, dtype):
    """Free memory full of NaN, so that an output allocated next shows elements that a kernel did not write."""
    torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("D", [16, 72])
def test_packed_weights_match_the_reference_towers_attention_scores(D):
    M, H, K = 12, 3, 24
    x, weight, bias, cos, sin = make_inputs(M, H, D, K, torch.float32)
    q, k, v = (part.unflatten(-1, (H, D)) for part in F.linear(x, weight, bias).chunk(3, dim=-1))
    expected = torch.einsum("ihd,jhd->hij", apply_rope(q, cos, sin), apply_rope(k, cos, sin))
    packed = ops.qkv_rope(x, *pack_qkv(weight, bias, H), cos, sin, H, impl="triton")
    q2, k2 = packed[:, : 2 * H * D].unflatten(1, (2, H, D)).unbind(1)
    v2 = packed[:, 2 * H * D :].unflatten(1, (H, value_width(D)))
    torch.testing.assert_close(torch.einsum("ihd,jhd->hij", q2, k2), expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(v2[..., :D], v, rtol=1e-4, atol=1e-3)
    assert v2[..., D:].eq(1).all()


@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_packed_rows_are_unpacked(head_dim):
    weight, bias = torch.randn(3 * 3 * head_dim, 8), torch.randn(3 * 3 * head_dim)
    packed_weight, packed_bias = pack_qkv(weight, bias, 3)
    assert len(packed_weight) == len(packed_bias) == 3 * (2 * head_dim + (64 if head_dim == 64 else 80))
    assert torch.equal(unpack_qkv_rows(packed_weight, 3, head_dim), weight)
    assert torch.equal(unpack_qkv_rows(packed_bias, 3, head_dim), bias)
    assert pack_qkv(weight, None, 3)[1] is None


def test_rotary_pairs_become_adjacent():
    order = adjacent_pairs(num_heads=2, head_dim=8)
    assert order[:16].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert order[16:32].tolist() == [n + 16 for n in order[:16].tolist()]
    assert order[32:].tolist() == list(range(32, 48))
    for num_heads, rows in ((2, 50), (2, 3 * 2 * 5), (3, 3 * 3 * 7), (4, 3 * 2 * 8 + 12)):  # none, or odd head_dim
        with pytest.raises(ValueError, match=f"weight: expected rows .* {num_heads} heads .*, got {rows} rows"):
            pack_qkv(torch.zeros(rows, 4), None, num_heads)


@pytest.mark.parametrize("interleaved", [True, False], ids=["adjacent", "rotate_half"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_op_agrees_with_fp64(dtype, impl, interleaved):
    one_row = [(1, 1, 4, 8)] if impl == "triton" else []  # some CPUs' BLAS adds up a single row in another order
    for M, H, D, K in ((37, 2, 16, 40), (5, 3, 72, 16), *one_row):
        x, weight, bias, cos, sin = make_inputs(M, H, D, K, dtype)
        expected = truth(x, weight, bias, cos, sin, H, interleaved)
        free_nan_memory(M, 3 * H * D, dtype=dtype)
        got = ops.qkv_rope(x, weight, bias, cos, sin, H, interleaved, impl=impl)
        unfused = torch_among_many_rows(x, weight, bias, cos, sin, H, interleaved)
        assert got.dtype == dtype
        assert error(got, expected) <= error_bound(unfused, expected)


@settings(max_examples=8 if ON_GPU else 12, deadline=None)
@given(
    M=st.integers(1, 70),
    H=st.integers(1, 5),
    D=st.sampled_from([4, 8, 12, 16, 64, 72, 80]),
    K=st.sampled_from([8, 24, 64]),
    group=st.sampled_from([4, 8, 16, 32]),
    tma=st.booleans(),
    with_bias=st.booleans(),
)
@example(M=40, H=2, D=16, K=8, group=16, tma=True, with_bias=True)  # no tile has columns of both K and V
@example(M=40, H=4, D=72, K=8, group=32, tma=True, with_bias=True)  # a group has channels of two heads
def test_fused_kernel_at_any_shape(M, H, D, K, group, tma, with_bias):
    """Check tiles that reach past the output, tiles with columns of K and V, and loads by TMA and by pointer."""
    if 3 * H * D % math.lcm(D, group):
        group = kernel.channel_group(3 * H * D, D)
    x, weight, bias, cos, sin = make_inputs(M, H, D, K, torch.float16 if ON_GPU else torch.float32, seed=M)
    bias = bias if with_bias else None
    expected = truth(x, weight, bias, cos, sin, H)
    cos[:, D // 2 :] = sin[:, D // 2 :] = float("nan")  # never read
    with pytest.MonkeyPatch.context() as patch:
        if not tma:
            patch.setattr(kernel, "uses_tma", lambda *_: False)
        free_nan_memory(M, 3 * H * D, dtype=x.dtype)
        got = kernel.project_and_rotate(x, weight, bias, cos, sin, H, SMALL_TILE, group)
    assert error(got, expected) <= (1e-3 if ON_GPU else 1e-6)


@pytest.mark.parametrize("wrong", ["stride", "x's address", "weight's address"])
def test_the_fused_kernel_reads_unaligned_rows(wrong):
    """A TMA descriptor of such rows is refused, or reads others."""
    dtype = torch.float16 if ON_GPU else torch.float32
    x, weight, bias, cos, sin = make_inputs(37, 2, 16, 10 if wrong == "stride" else 16, dtype)
    if wrong != "stride":
        moved = x if wrong == "x's address" else weight
        moved = torch.empty(moved.numel() + 1, device=DEVICE, dtype=dtype)[1:].view(moved.shape).copy_(moved)
        x, weight = (moved, weight) if wrong == "x's address" else (x, moved)
    got = kernel.project_and_rotate(x, weight, bias, cos, sin, 2, SMALL_TILE)
    assert error(got, truth(x, weight, bias, cos, sin, 2)) <= (1e-3 if ON_GPU else 1e-6)


@pytest.mark.parametrize("v_width", [72, 80])
@pytest.mark.parametrize("interleaved", [True, False], ids=["adjacent", "rotate_half"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_rotation_in_place_writes_nothing_to_v_but_ones_beside_it(impl, interleaved, v_width):
    M, H, D = 9, 5, 72
    qkv = torch.randn(M, 2 * H * D + H * v_width, device=DEVICE)
    qkv[:, 2 * H * D :: 3] = float("inf")  # a rotation by 0 would make it NaN
    cos, sin = (t.to(DEVICE) for t in rope_cos_sin(torch.randint(0, 99, (M, 2)), D, 10000.0))
    before = qkv.clone()
    assert ops.rotate_qk_(qkv, cos, sin, H, interleaved, impl=impl) is qkv
    v, v_before = (x[:, 2 * H * D :].unflatten(1, (H, v_width)) for x in (qkv, before))
    assert torch.equal(v[..., :D], v_before[..., :D])
    assert v[..., D:].eq(1).all()
    expected = reference.rotate_qk(before.nan_to_num(), cos.double(), sin.double(), H, interleaved)
    torch.testing.assert_close(qkv[:, : 2 * H * D], expected[:, : 2 * H * D])
    assert not torch.equal(qkv[:, : 2 * H * D], before[:, : 2 * H * D])


def test_no_rows():
    x, weight, bias, cos, sin = make_inputs(0, 2, 16, 8, torch.float16)
    assert ops.qkv_rope(x, weight, bias, cos, sin, 2, impl="triton").shape == (0, 96)


def test_bad_arguments():
    x, weight, bias, cos, sin = make_inputs(6, 2, 16, 8, torch.float32)
    for arguments, message in (
        ((x[:, :4], weight, bias, cos, sin, 2), r"hidden_states: expected contiguous"),
        ((x, weight[:, :4].contiguous(), bias, cos, sin, 2), r"weight: expected shape \[any, 8\], got \[96, 4\]"),
        ((x, weight, bias[:5], cos, sin, 2), r"bias: expected .*\[96\]"),
        ((x, weight, bias, cos, sin, 5), r"weight: expected columns of Q, K and V in 5 heads"),
        ((x, weight, bias, cos, sin, 0), r"weight: expected columns of Q, K and V in 0 heads"),
        ((x, weight[:90], bias[:90], cos, sin, 2), r"weight: expected columns of Q, K and V in 2 heads .*, got 90"),
        ((x, weight, bias, cos[:, :12].contiguous(), sin, 2), r"cos: expected shape \[6, 16\], got \[6, 12\]"),
        ((x, weight, bias, cos[:3], sin, 2), r"cos: expected .*\[6, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.qkv_rope(*arguments)
    with pytest.raises(TypeError, match=r"sin: expected torch\.float32, got torch\.float16"):
        ops.qkv_rope(x, weight, bias, cos, sin.half(), 2)
    with pytest.raises(TypeError, match="hidden_states: expected a float32, bfloat16 or float16"):
        ops.qkv_rope(x.double(), weight, bias, cos, sin, 2)
    with pytest.raises(ValueError, match="impl"):
        ops.qkv_rope(x, weight, bias, cos, sin, 2, impl="cuda")


def values(packed, H, D):
    """Check the ones beside V, and return Q, K and V without them."""
    v = packed[:, 2 * H * D :].unflatten(1, (H, -1))
    assert v[..., D:].eq(1).all()
    return torch.cat((packed[:, : 2 * H * D], v[..., :D].flatten(1)), 1)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("D", "K", "H"), [(80, 1280, 16), (72, 1152, 16), (64, 1024, 16), (64, 768, 12)])
def test_published_shapes(D, K, H, dtype):
    for M in (1, 784, 1024, 4099):
        x, weight, bias, cos, sin = make_inputs(M, H, D, K, dtype)
        expected = truth(x, weight, bias, cos, sin, H)
        bound = 1.05 * error(torch_among_many_rows(x, weight, bias, cos, sin, H, True), expected)
        got = [ops.qkv_rope(x, weight, bias, cos, sin, H)]
        if D == 72:  # torch gets the packed weight too: in fp32 cuBLAS may add in another order for another width
            order = adjacent_pairs(H, D, DEVICE).argsort()
            packed = x, *pack_qkv(weight[order], bias[order], H), cos, sin, H
            ours, theirs = (values(y, H, D) for y in (ops.qkv_rope(*packed), torch_among_many_rows(*packed, True)))
            assert error(ours, expected) <= 1.05 * error(theirs, expected)
        if dtype != torch.float32:
            free_nan_memory(M, 3 * H * D, dtype=dtype)
            got += [kernel.project_and_rotate(x, weight, bias, cos, sin, H) for _ in range(2)]
            assert torch.equal(got[-1], got[-2])
            alone = kernel.project_and_rotate(x[:1], weight, bias, cos[:1], sin[:1], H)
            assert torch.equal(alone, got[-1][:1])
        for y in got:
            assert error(y, expected) <= bound


@needs_gpu
@pytest.mark.parametrize("D", [72, 80])
def test_torch_compile_and_cuda_graph(D):
    x, weight, bias, cos, sin = make_inputs(1024, 16, D, 1280, torch.bfloat16)
    weight, bias = pack_qkv(weight, bias, 16)

    def step(x):
        y = ops.qkv_rope(x * 1, weight, bias, cos, sin, 16)
        return ops.rotate_qk_(y + 0, cos, sin, 16)

    expected = step(x)
    assert torch.equal(torch.compile(step, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x)
    x.mul_(2)
    graph.replay()
    assert torch.equal(out, step(x))
