"""Copies of the first rows of several matrices in one launch: bitwise the rows, in memory of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit import ops
from qwenvit.kernels import clone_rows as kernel_file

pytestmark = pytest.mark.usefixtures("outputs_full_of_nan")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""The dtypes, and integers that show their bits."""


def any_bits(rows, width, dtype):
    """Return a matrix of random bits: every kind of NaN, infinities, denormal numbers, both zeros."""
    return torch.randint(-(2**31), 2**31, (rows, width), device=DEVICE).to(DTYPES[dtype]).view(dtype)


def check(tensors, rows, impl):
    before = [x.clone() for x in tensors]
    copies = ops.clone_rows(tensors, rows, impl=impl)
    assert len(copies) == len(tensors)
    for x, original, copied in zip(tensors, before, copies, strict=True):
        bits = DTYPES[x.dtype]
        assert copied.dtype == x.dtype
        assert copied.is_contiguous()
        assert torch.equal(copied.view(bits), original[:rows].view(bits))
        assert copied.untyped_storage().nbytes() == rows * x.shape[1] * x.element_size()
        copied.zero_()  # memory of its own
        assert torch.equal(x.view(bits), original.view(bits))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 200)), min_size=1, max_size=7),
    st.integers(0, 40),
    st.sampled_from(list(DTYPES)),
)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_any_matrices(impl, matrices, rows, dtype):
    check([any_bits(rows + spare, width, dtype) for spare, width in matrices], rows, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(5120, 3584), (4608, *[4096] * 4)], ids=["Qwen2.5-VL-7B", "Qwen3-VL-8B"])
def test_outputs_of_published_towers(widths, dtype):
    for rows in (1, 64, *((1024, 8192) if GPU else ())):
        check([any_bits(rows + 3, width, dtype) for width in widths], rows, "triton")


def test_all_matrices_are_copied_in_one_launch(monkeypatch):
    launches, launch = [], kernel_file._clone_rows

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return launch[grid]

    monkeypatch.setattr(kernel_file, "_clone_rows", Counted())
    check([any_bits(70, width, torch.float32) for width in (96, 1, 300)], 64, "triton")
    assert len(launches) == 1


def test_torch_compile_passes_through():
    x, y = torch.randn(9, 24, device=DEVICE), torch.randn(7, 5, device=DEVICE)

    def copies(x, y):
        return ops.clone_rows([x, y], 6, impl="triton")

    compiled = torch.compile(copies, fullgraph=True, backend="aot_eager")(x, y)
    assert torch.equal(compiled[0], x[:6])
    assert torch.equal(compiled[1], y[:6])
    torch.library.opcheck(torch.ops.qwenvit.clone_rows.default, ([x, y], 6))


X = torch.zeros(8, 6)


@pytest.mark.parametrize(
    ("error", "message", "tensors", "rows"),
    [
        (ValueError, "tensors: expected at least one matrix, got none", [], 0),
        (ValueError, r"tensors\[1\]: expected shape \[any, any\], got \[6\]", [X, X[0]], 1),
        (ValueError, r"tensors\[0\]: expected contiguous", [X.T, X], 1),
        (ValueError, r"tensors\[1\]: expected on cpu, got meta", [X, X.to("meta")], 1),
        (TypeError, r"tensors\[1\]: expected torch.float32, got torch.float16", [X, X.half()], 1),
        (TypeError, r"tensors\[0\]: expected a float32, bfloat16 or float16 tensor", [X.double()], 1),
        (TypeError, r"tensors\[1\]: expected a float32, bfloat16 or float16 tensor .*, got list", [X, X.tolist()], 1),
        (ValueError, r"rows: expected 0 to the 7 rows of tensors\[1\], got 8", [X, X[:7]], 8),
        (ValueError, r"rows: expected 0 to the 8 rows of tensors\[0\], got -1", [X], -1),
        (ValueError, "impl: 'triton' means Triton here", [X, torch.zeros(8, 6, requires_grad=True)], 1),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, tensors, rows):
    with pytest.raises(error, match=message):
        ops.clone_rows(tensors, rows, impl="triton")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_more_than_two_to_the_31_elements():
    x = torch.empty(2**16 + 1, 2**15 + 8, dtype=torch.bfloat16, device="cuda")
    x[-2:] = torch.arange(2 * x.shape[1], device="cuda").view(2, -1) % 251
    (copied,) = ops.clone_rows([x], len(x), impl="triton")
    assert torch.equal(copied[-2:], x[-2:])
