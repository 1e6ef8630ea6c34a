"""RMSNorm and LayerNorm in Triton: against fp64, and bitwise the same in every batch and run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit import ops
from qwenvit.ops import reference
from qwenvit.parity import ERROR_FACTOR, Difference
from qwenvit.towers.reference import RMSNorm

pytestmark = pytest.mark.usefixtures("outputs_full_of_nan")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
EPS = 1e-6
KINDS = ["rms", "layer"]


def make_rows(rows, width, dtype, offset=0.5):
    """Return rows whose mean is not zero, with some channels 100 times larger, as in published checkpoints."""
    x = torch.randn(rows, width, device=DEVICE) + offset
    x[:, :: max(width // 5, 1)] *= 100
    return x.to(dtype)


def make_weights(width, kind, dtype):
    return torch.randn(width, device=DEVICE).to(dtype), torch.randn(width, device=DEVICE).to(
        dtype
    ) if kind == "layer" else None


def truth(x, weight, bias, kind):
    x64 = x.double()
    if kind == "layer":
        x64 = x64 - x64.mean(-1, keepdim=True)
    x64 = x64 / (x64.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    return x64 if bias is None else x64 + bias.double()


def assert_no_worse(actual, reference, expected):
    """Assert an error of at most ERROR_FACTOR times plain torch's, or of fp32's epsilon: sums may differ in order."""
    error = Difference.of(actual, expected).relative_l2
    assert error <= max(ERROR_FACTOR * Difference.of(reference, expected).relative_l2, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1280, 1152, 1024, 768, 5120, 1000])
def test_error_is_at_most_torchs(width, kind, dtype):
    rows = 32
    x, residual = make_rows(rows, width, dtype), make_rows(rows, width, dtype)
    weight, bias = make_weights(width, kind, dtype)
    y = ops.norm(x, weight, bias, kind, impl="triton")
    assert_no_worse(y, ops.norm(x, weight, bias, kind, impl="reference"), truth(x, weight, bias, kind))
    y, total = ops.add_norm(x, residual, weight, bias, kind, impl="triton")
    expected, expected_total = ops.add_norm(x, residual, weight, bias, kind, impl="reference")
    assert_no_worse(y, expected, truth(x.double() + residual.double(), weight, bias, kind))
    assert torch.equal(total, expected_total)
    shift = make_rows(1, width, dtype)[0]
    shifted_y, shifted = ops.add_norm(x, residual, weight, bias, kind, shift=shift, impl="triton")
    _, reference = ops.add_norm(x, residual, weight, bias, kind, shift=shift, impl="reference")
    assert torch.equal(shifted_y, y)
    assert_no_worse(shifted, reference, x.double() + residual.double() + shift.double())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(1, 300), st.sampled_from(KINDS), st.booleans())
def test_any_shape(rows, width, kind, with_bias):
    x, residual = torch.randn(rows, width, device=DEVICE), torch.randn(rows, width, device=DEVICE)
    weight, bias = make_weights(width, kind, torch.float32)
    bias = bias if with_bias else None
    for actual, expected in (
        ([ops.norm(x, weight, bias, kind, impl="triton")], [ops.norm(x, weight, bias, kind, impl="reference")]),
        (
            ops.add_norm(x, residual, weight, bias, kind, impl="triton"),
            ops.add_norm(x, residual, weight, bias, kind, impl="reference"),
        ),
    ):
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean_costs_no_precision(kind):
    """Compute the variance from centred values; the difference of two large sums would cancel."""
    x = torch.randn(16, 1280, device=DEVICE) + 1000
    weight, bias = make_weights(1280, kind, torch.float32)
    actual = ops.norm(x, weight, bias, kind, impl="triton")
    assert Difference.of(actual, truth(x, weight, bias, kind)).relative_l2 < 1e-4  # the mean itself rounds to 3e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_bitwise_the_same_alone_and_in_every_run(kind):
    x, residual = make_rows(33, 1152, torch.float16), make_rows(33, 1152, torch.float16)
    weight, bias = make_weights(1152, kind, torch.float16)
    y, total = ops.add_norm(x, residual, weight, bias, kind, impl="triton")
    again, _ = ops.add_norm(x, residual, weight, bias, kind, impl="triton")
    alone, alone_total = ops.add_norm(x[17:18], residual[17:18], weight, bias, kind, impl="triton")
    assert torch.equal(y, again)
    assert torch.equal(y[17:18], alone)
    assert torch.equal(total[17:18], alone_total)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [40, 1152, 1280])
def test_the_sum_overwrites_the_residual(kind, width, impl):
    rows = 300 if DEVICE == "cuda" else 20  # on a GPU, more programs than run at once
    x, residual = make_rows(rows, width, torch.float16), make_rows(rows, width, torch.float16)
    weight, bias = make_weights(width, kind, torch.float16)
    shift = make_weights(width, "layer", torch.float16)[1]
    y, total = ops.add_norm(x, residual, weight, bias, kind, shift=shift, impl=impl)
    before = x.clone()
    in_place = ops.add_norm_(x, residual, weight, bias, kind, shift=shift, impl=impl)
    assert torch.equal(in_place, y)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions_are_kept(kind):
    x = make_rows(6, 64, torch.float32).view(2, 3, 64)
    weight, bias = make_weights(64, kind, torch.float32)
    y, total = ops.add_norm(x, x, weight, bias, kind, impl="triton")
    assert y.shape == total.shape == x.shape
    assert ops.norm(x[0, 0], weight, bias, kind, impl="triton").shape == (64,)


def test_the_reference_equals_the_towers_norms():
    x = make_rows(5, 96, torch.float16).cpu()
    rms, layer = RMSNorm(96).half(), torch.nn.LayerNorm(96, eps=EPS).half()
    with torch.no_grad():
        rms.weight.normal_(), layer.weight.normal_(), layer.bias.normal_()
        assert torch.equal(reference.norm(x, rms.weight, None, "rms", EPS), rms(x))
        assert torch.equal(reference.norm(x, layer.weight, layer.bias, "layer", EPS), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_passes_through(kind):
    x, residual = make_rows(4, 40, torch.float32), make_rows(4, 40, torch.float32)
    weight, bias = make_weights(40, kind, torch.float32)

    def norms(x, residual):
        y, total = ops.add_norm(x, residual, weight, bias, kind, impl="triton")
        y = y + ops.add_norm_(x * 2, total, weight, bias, kind, impl="triton")
        return ops.norm(y, weight, bias, kind, impl="triton"), total

    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x, residual), norms(x, residual), strict=True):
        assert torch.equal(ours, theirs)
    torch.library.opcheck(torch.ops.qwenvit.norm.default, (x, weight, bias, kind, EPS))
    for op in (torch.ops.qwenvit.add_norm.default, torch.ops.qwenvit.add_norm_.default):
        torch.library.opcheck(op, (x, residual, weight, bias, None, kind, EPS))


X, W = torch.zeros(4, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x: .*got torch.int64", (X.long(), W)),
        (TypeError, "x: .*got list", ([1.0], W)),
        (ValueError, "x: .*scalar", (torch.tensor(1.0), W)),
        (ValueError, "x: expected contiguous", (X.t(), torch.zeros(4))),
        (ValueError, r"weight: expected shape \[8\], got \[7\]", (X, W[:7])),
        (TypeError, "weight: expected torch.float32", (X, W.half())),
        (ValueError, "weight: expected on cpu, got meta", (X, W.to("meta"))),
        (ValueError, "bias: RMSNorm has none", (X, W, W)),
        (ValueError, "kind: expected 'rms' or 'layer', got 'batch'", (X, W, None, "batch")),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_bad_arguments(impl, error, message, arguments):
    with pytest.raises(error, match=message):
        ops.norm(*arguments, impl=impl)


def test_bad_residual():
    with pytest.raises(ValueError, match=r"residual: expected shape \[4, 8\], got \[3, 8\]"):
        ops.add_norm(X, X[:3], W)
    with pytest.raises(ValueError, match=r"residual: expected shape \[4, 8\], got \[3, 8\]"):
        ops.add_norm_(X, X[:3], W)
    with pytest.raises(ValueError, match=r"shift: expected shape \[8\], got \[4, 8\]"):
        ops.add_norm(X, X, W, shift=X)
    with pytest.raises(ValueError, match="impl: expected"):
        ops.add_norm(X, X, W, impl="cuda")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "width"), [("rms", 1280), ("layer", 1280), ("layer", 1152), ("layer", 768)])
@pytest.mark.parametrize("rows", [1, 784, 7056, 16384])
def test_published_shapes(rows, kind, width, dtype):
    x, residual = make_rows(rows, width, dtype), make_rows(rows, width, dtype)
    weight, bias = make_weights(width, kind, dtype)
    y, total = ops.add_norm(x, residual, weight, bias, kind)
    expected, expected_total = ops.add_norm(x, residual, weight, bias, kind, impl="reference")
    assert_no_worse(y, expected, truth(x.double() + residual.double(), weight, bias, kind))
    assert torch.equal(total, expected_total)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_beyond_32_bit_addresses():
    width = 1280
    x = torch.ones(2**31 // width + 9, width, device=DEVICE, dtype=torch.bfloat16)
    x[-1] = torch.randn(width, device=DEVICE)
    weight, _ = make_weights(width, "rms", torch.bfloat16)
    assert torch.equal(ops.norm(x, weight)[-1], ops.norm(x[-1], weight))
