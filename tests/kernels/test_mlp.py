"""Projection with activation: the fused kernel, the passes, and packed weights, against fp64."""

# ruff: noqa: N803, N806
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit import ops
from qwenvit.kernels.gemm import mlp as kernel
from qwenvit.kernels.gemm import tiles
from qwenvit.kernels.gemm.cublas import MIN_ROWS
from qwenvit.kernels.gemm.tiles import Tile, uses_tma
from qwenvit.ops.packing import pack_gate_up, pad_columns
from support.errors import error, error_bound

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
SMALL_TILE = Tile(32, 64, 32, 4, 2, 1, band=2)
ACTS = ["gelu_tanh", "quick_gelu", "gelu"]


def make_inputs(M, N, K, dtype, seed=0):
    """Return x, weight and bias of one projection; some channels of x are 100 times larger than the rest.

    In fp16 they are 10 times larger: a product of gate and up would overflow.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g)
    x[:, :: max(K // 3, 1)] *= 10 if dtype == torch.float16 else 100
    weight = torch.randn(N, K, generator=g) * K**-0.5
    return [t.to(DEVICE, dtype) for t in (x, weight, torch.randn(N, generator=g))]


def activation_fp64(y, act):
    if act == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    return F.gelu(y, approximate="tanh" if act == "gelu_tanh" else "none")


def truth(x, weight, bias, act):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return F.silu(y[:, 0::2]) * y[:, 1::2] if act == "swiglu" else activation_fp64(y, act)


def run(act, x, weight, bias, impl):
    return (
        ops.swiglu(x, weight, bias, impl=impl) if act == "swiglu" else ops.linear_act(x, weight, bias, act, impl=impl)
    )


def torch_among_many_rows(act, x, weight, bias):
    """Return the reference with `x` padded to MIN_ROWS, as cuBLAS gets it: sums of few rows may have another order."""
    return run(act, F.pad(x, (0, 0, 0, max(MIN_ROWS - len(x), 0))), weight, bias, "reference")[: len(x)]


def free_nan_memory(*shape, dtype):
    """Free memory full of NaN, so that an output allocated next shows elements that a kernel did not write."""
    torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("act", [*ACTS, "swiglu"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_op_agrees_with_fp64(dtype, impl, act):
    one_row = [(1, 2, 8)] if impl == "triton" else []  # some CPUs' BLAS adds up a single row in another order
    for M, N, K in ((37, 72, 40), (5, 144, 16), *one_row):
        x, weight, bias = make_inputs(M, N, K, dtype)
        expected = truth(x, weight, bias, act)
        free_nan_memory(M, N, dtype=dtype)
        got = run(act, x, weight, bias, impl)
        assert got.dtype == dtype
        assert error(got, expected) <= error_bound(torch_among_many_rows(act, x, weight, bias), expected)


@settings(max_examples=8 if ON_GPU else 12, deadline=None)
@given(
    M=st.integers(1, 70),
    N=st.integers(1, 60),
    K=st.sampled_from([8, 24, 64]),
    act=st.sampled_from([*ACTS, "silu"]),
    tma=st.booleans(),
    with_bias=st.booleans(),
)
def test_fused_kernel_at_any_shape(M, N, K, act, tma, with_bias):
    gated = act == "silu"
    x, weight, bias = make_inputs(M, 2 * N, K, torch.float16 if ON_GPU else torch.float32, seed=M)
    bias = bias if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        if not tma:
            patch.setattr(kernel, "uses_tma", lambda *_: False)
        free_nan_memory(M, 2 * N, dtype=x.dtype)
        got = kernel.project_and_activate(x, weight, bias, act, gated, SMALL_TILE)
    assert error(got, truth(x, weight, bias, "swiglu" if gated else act)) <= (1e-3 if ON_GPU else 1e-6)


def test_tma_reads_rows_that_start_at_multiples_of_16_bytes_only(monkeypatch):
    aligned = torch.zeros(9, 16, device=DEVICE, dtype=torch.float16)
    rows_of_24_bytes, off_by_2_bytes = aligned.view(-1)[:96].view(8, 12), aligned.view(-1)[1:129].view(8, 16)
    monkeypatch.setattr(tiles, "capability", lambda _: (9, 0))
    assert uses_tma(aligned, aligned)
    assert uses_tma(aligned[:, :5], aligned.float()[:, 4:])  # TMA reads any number of columns
    assert uses_tma(rows_of_24_bytes.float(), aligned)  # rows of 48 bytes
    for wrong in (rows_of_24_bytes, off_by_2_bytes):
        assert not uses_tma(wrong)
        assert not uses_tma(aligned, wrong)
        assert not uses_tma(wrong, aligned)
    for major, minor in ((8, 0), (8, 9)):
        monkeypatch.setattr(tiles, "capability", lambda _, found=(major, minor): found)
        assert not uses_tma(aligned, aligned)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("wrong", ["stride", "x's address", "weight's address"])
def test_the_fused_kernel_reads_unaligned_rows(wrong, gated):
    """A TMA descriptor of such rows is refused, or reads others."""
    dtype = torch.float16 if ON_GPU else torch.float32
    x, weight, bias = make_inputs(37, 24, 10 if wrong == "stride" else 16, dtype)
    if wrong != "stride":
        moved = x if wrong == "x's address" else weight
        moved = torch.empty(moved.numel() + 1, device=DEVICE, dtype=dtype)[1:].view(moved.shape).copy_(moved)
        x, weight = (moved, weight) if wrong == "x's address" else (x, moved)
    got = kernel.project_and_activate(x, weight, bias, "silu" if gated else "gelu", gated, SMALL_TILE)
    assert error(got, truth(x, weight, bias, "swiglu" if gated else "gelu")) <= (1e-3 if ON_GPU else 1e-6)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_passes_at_odd_shapes(impl):
    torch.manual_seed(0)
    for M, N in ((1, 2), (3, 500), (2, 4304), (7, 6912)):
        x = torch.randn(M, N, device=DEVICE) * 3
        x.view(-1)[:: max(M * N // 7, 1)] *= 1000
        free_nan_memory(M, N // 2, dtype=x.dtype)
        gate, up = x.double()[:, 0::2], x.double()[:, 1::2]
        torch.testing.assert_close(ops.swiglu_pass(x, impl=impl).double(), F.silu(gate) * up, rtol=2e-5, atol=1e-5)
        for act in ACTS:
            y = x.clone()
            assert ops.activation_(y, act, impl=impl) is y
            torch.testing.assert_close(y.double(), activation_fp64(x.double(), act), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_activations_of_extreme_values(dtype):
    limit = torch.finfo(dtype).max / 4
    x = torch.tensor([[-limit, -300.0, -0.0, 0.0, 300.0, limit, float("inf"), float("nan")]], device=DEVICE).to(dtype)
    for act in ACTS:
        y = ops.activation_(x.clone(), act, impl="triton")
        assert y[0, :4].abs().max() == 0
        torch.testing.assert_close(y[0, 4:7], x[0, 4:7])
        assert y[0, 7].isnan()


def test_negative_tail_of_exact_gelu():
    """Check each element, where 1 + erf(x) cancels."""
    x = -torch.linspace(0, 4, 3001, device=DEVICE)[None].half()
    x64 = x.double()
    expected = x64 * torch.special.ndtr(x64)
    got = ops.activation_(x.clone(), "gelu", impl="triton").double()
    assert ((got - expected).abs() <= 2**-10.9 * expected.abs()).all()


def test_packed_gate_and_up_match_the_reference_towers_mlp():
    M, C, width = 11, 24, 50
    x = torch.randn(M, C, device=DEVICE)
    gate, up, down = (torch.nn.Linear(*widths, device=DEVICE) for widths in ((C, width), (C, width), (width, C)))
    expected = down(F.silu(gate(x)) * up(x))
    weight, bias = pack_gate_up(gate.weight, gate.bias, up.weight, up.bias)
    down_weight = pad_columns(down.weight)
    assert (weight.shape, bias.shape, down_weight.shape) == ((256, C), (256,), (C, 128))
    with torch.no_grad():
        got = F.linear(ops.swiglu(x, weight, bias, impl="triton"), down_weight, down.bias)
    torch.testing.assert_close(got, expected)
    assert pack_gate_up(gate.weight, None, up.weight, None)[1] is None
    with pytest.raises(ValueError, match="up_weight: expected the gate's shape"):
        pack_gate_up(gate.weight, None, down.weight, None)
    with pytest.raises(ValueError, match="up_bias"):
        pack_gate_up(gate.weight, gate.bias, up.weight, None)


def test_no_rows():
    x, weight, bias = make_inputs(0, 72, 8, torch.float16)
    assert ops.linear_act(x, weight, bias, "gelu", impl="triton").shape == (0, 72)
    assert ops.swiglu(x, weight, bias, impl="triton").shape == (0, 36)
    assert ops.swiglu_pass(weight[:0], impl="triton").shape == (0, 4)


def test_bad_arguments():
    x, weight, bias = make_inputs(6, 9, 8, torch.float32)
    with pytest.raises(ValueError, match=r"act: expected one of .*'gelu_tanh'.*got 'relu'"):
        ops.linear_act(x, weight, bias, "relu")
    with pytest.raises(ValueError, match="gate_up_weight: expected an even number of rows, got 9"):
        ops.swiglu(x, weight, bias)
    with pytest.raises(ValueError, match="gate_up: expected an even number of columns, got 9"):
        ops.swiglu_pass(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"gate_up_bias: expected .*\[9\].*got .*\[4\]"):
        ops.swiglu(x, weight, bias[:4])
    with pytest.raises(TypeError, match="x: expected a float32, bfloat16 or float16"):
        ops.activation_(torch.zeros(2, 2, dtype=torch.int32), "gelu")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("act", "N", "K"),
    [("swiglu", 6912, 1280), ("gelu_tanh", 4304, 1152), ("gelu_tanh", 4096, 1024), ("quick_gelu", 5120, 1280),
     ("gelu", 4608, 4608)],
)  # fmt: skip
def test_published_shapes(act, N, K, dtype):
    for M in (1, 784, 1024, 4099):
        x, weight, bias = make_inputs(M, N, K, dtype)
        expected = truth(x, weight, bias, act)
        bound = error_bound(torch_among_many_rows(act, x, weight, bias), expected)
        got = [run(act, x, weight, bias, "triton")]
        if dtype != torch.float32:
            fused = ("silu" if act == "swiglu" else act, act == "swiglu")
            free_nan_memory(M, N, dtype=dtype)
            got += [kernel.project_and_activate(x, weight, bias, *fused) for _ in range(2)]
            assert torch.equal(got[1], got[2])
            assert torch.equal(kernel.project_and_activate(x[:1], weight, bias, *fused), got[1][:1])
        for y in got:
            assert error(y, expected) <= bound


@needs_gpu
def test_torch_compile_and_cuda_graph():
    x, weight, bias = make_inputs(1024, 512, 256, torch.bfloat16)

    def step(x):
        y = ops.linear_act(x * 1, weight, bias, "gelu_tanh") + ops.activation_(
            ops.linear_act(x, weight, bias, "gelu"), "gelu"
        )
        return ops.swiglu(x, weight, bias) + ops.swiglu_pass(y)

    expected = step(x)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), expected, rtol=2e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x)
    x.mul_(2)
    graph.replay()
    assert torch.equal(out, step(x))
