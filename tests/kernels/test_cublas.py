"""Matrix products whose rows do not depend on their number: padding of few rows, against fp64 and among many rows."""

# ruff: noqa: N803
import pytest
import torch
import torch.nn.functional as F

from qwenvit import ops
from qwenvit.config.published import PUBLISHED
from qwenvit.kernels.gemm import cublas
from qwenvit.ops.packing import WIDTH_MULTIPLE, packed_width

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROWS = (0, 1, 5, cublas.MIN_ROWS - 1, cublas.MIN_ROWS, cublas.MIN_ROWS + 3)


def make_inputs(M, N, K, dtype):
    g = torch.Generator().manual_seed(M)
    x, total = torch.randn(M, K, generator=g), torch.randn(M, N, generator=g)
    x[:, :: max(K // 3, 1)] *= 100
    weight = torch.randn(N, K, generator=g) * K**-0.5
    return [t.to(DEVICE, dtype) for t in (x, total, weight, torch.randn(N, generator=g))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", ROWS)
def test_products_are_those_of_many_rows(M, dtype):
    """Rows that are added have no influence, whatever their values, and are not returned."""
    x, total, weight, bias = make_inputs(M, 24, 40, dtype)
    more = max(cublas.MIN_ROWS - M, 0)
    torch.full((cublas.MIN_ROWS, 40), float("nan"), device=DEVICE, dtype=dtype)  # freed: the padding may get it
    for b in (bias, None):
        y = ops.linear(x, weight, b, impl="triton")
        assert torch.equal(y, F.linear(F.pad(x, (0, 0, 0, more)), weight, b)[:M])
    expected = F.pad(total, (0, 0, 0, more)).addmm_(F.pad(x, (0, 0, 0, more)), weight.T)[:M]
    exact = total.double() + x.double() @ weight.double().T
    assert ops.add_linear_(total, x, weight, impl="triton") is total
    assert torch.equal(total, expected)
    torch.testing.assert_close(total.double(), exact, rtol=1e-2, atol=1e-4 if dtype == torch.float32 else 2)
    reference = ops.linear(x, weight, bias, impl="reference")
    assert torch.equal(reference, F.linear(x, weight, bias))


def test_padding_keeps_the_distance_between_rows(monkeypatch):
    """cuBLAS's choice may depend on it: rows of the patch embedding start at multiples of 128 bytes."""
    seen, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *arguments: seen.append(x) or linear(x, *arguments))
    x, _, weight, _ = make_inputs(8, 24, 40, torch.float32)
    cublas.linear(F.pad(x, (0, 24))[:, :40], weight, None)
    assert [(rows.shape, rows.stride()) for rows in seen] == [((cublas.MIN_ROWS, 40), (64, 1))]


def test_bad_arguments():
    x, total, weight, bias = make_inputs(6, 9, 8, torch.float32)
    with pytest.raises(ValueError, match=r"weight: expected shape \[any, 8\], got \[9, 4\]"):
        ops.linear(x, weight[:, :4].contiguous())
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32, got torch\.float16"):
        ops.linear(x, weight, bias.half())
    with pytest.raises(ValueError, match=r"total: expected shape \[6, 9\], got \[5, 9\]"):
        ops.add_linear_(total[:5], x, weight)


def published_products():
    """Return (N, K) of every product that cuBLAS computes in a published tower."""
    found = set()
    for config in (checkpoint.config for checkpoint in PUBLISHED.values()):
        width, merged = config.hidden_size, config.hidden_size * config.merge_unit
        middle = config.intermediate_size
        if config.traits.gated_mlp:
            middle = -(-middle // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        qkv = packed_width(config.num_heads, config.head_dim)
        found |= {(width, config.patch_dim), (qkv, width), (width, width), (middle, width), (width, middle)}
        found |= {(merged, merged), (config.out_hidden_size, merged)}
    return sorted(found)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "K"), published_products())
def test_a_row_has_the_same_bits_among_any_number_of_rows(N, K, dtype):
    """Fails where an installed version of cuBLAS splits K above MIN_ROWS rows."""
    most = 32768
    x, total, weight, bias = make_inputs(most, N, K, dtype)
    products = {
        "linear": lambda rows: cublas.linear(x[:rows], weight, bias),
        "linear without bias": lambda rows: cublas.linear(x[:rows], weight, None),
        "linear_gelu_tanh": lambda rows: cublas.linear_gelu_tanh(x[:rows], weight, bias),
        "add_linear_": lambda rows: cublas.add_linear_(total[:rows].clone(), x[:rows], weight),
    }
    for name, product in products.items():
        if name == "linear_gelu_tanh" and (N % 8 or K % 8):
            continue
        expected = product(most)
        for rows in (1, 4, 16, 64, 100, 196, 256, 260, 320, 400, 576, 784, 1024, 1764, 2304, 3136, 4096, 7056, 16384):
            assert torch.equal(product(rows), expected[:rows]), (name, rows)
