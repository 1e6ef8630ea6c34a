"""A merger's norm and reordering in one pass, and the merge of a map: against the reference tower, fp64 and loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit import VisionConfig, ops
from qwenvit.parity import ERROR_FACTOR, Difference
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.reference import Merger

pytestmark = pytest.mark.usefixtures("outputs_full_of_nan")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
EPS = 1e-6
GRIDS = [[1, 10, 12], [2, 4, 6], [1, 2, 2]]
QWEN2_5 = VisionConfig("qwen2_5_vl", 1, 96, 96, 2, 64, "silu", 14, window_size=112)
QWEN3 = VisionConfig("qwen3_vl", 1, 96, 96, 2, 64, "gelu_pytorch_tanh", 16, num_position_embeddings=16)


def outlier_randn(*shape, dtype=torch.float32):
    x = torch.randn(*shape, device=DEVICE) + 0.5
    x[..., :: max(shape[-1] // 5, 1)] *= 100
    return x.to(dtype)


def truth(x, weight, bias, kind, norm_merged, index):
    """Compute the norm in fp64 and gather the patches of each token."""
    x64 = x.double().view(-1, 4 * x.shape[-1]) if norm_merged else x.double()
    if kind == "layer":
        x64 = x64 - x64.mean(-1, keepdim=True)
    x64 = x64 / (x64.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    x64 = x64 if bias is None else x64 + bias.double()
    tokens = x64.reshape(-1, 4 * x.shape[-1])
    return tokens if index is None else torch.stack([tokens[i] for i in index.tolist()])


def assert_no_worse(actual, reference, expected):
    """Assert an error of at most ERROR_FACTOR times plain torch's, or of fp32's epsilon: sums may differ in order."""
    error = Difference.of(actual, expected).relative_l2
    assert error <= max(ERROR_FACTOR * Difference.of(reference, expected).relative_l2, torch.finfo(torch.float32).eps)


def run_both(x, weight, bias, index, kind, norm_merged):
    arguments = (x, weight, bias, index, kind, EPS, norm_merged)
    actual, reference = ops.merge_norm(*arguments, impl="triton"), ops.merge_norm(*arguments, impl="reference")
    assert actual.shape == reference.shape == (len(x) // 4, 4 * x.shape[1])
    assert_no_worse(actual, reference, truth(x, weight, bias, kind, norm_merged, index))
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize(("kind", "norm_merged"), [("rms", False), ("layer", False), ("layer", True)])
def test_norms_of_published_mergers(kind, norm_merged, reorder, dtype):
    plan = GridPlan.build(GRIDS, QWEN2_5, DEVICE)
    x = outlier_randn(plan.num_patches, 200, dtype=dtype)
    width = 800 if norm_merged else 200
    weight = outlier_randn(width, dtype=dtype)
    bias = outlier_randn(width, dtype=dtype) if kind == "layer" else None
    run_both(x, weight, bias, plan.restore_index if reorder else None, kind, norm_merged)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(("config", "norm_merged"), [(QWEN2_5, False), (QWEN3, False), (QWEN3, True)])
def test_it_matches_the_input_of_the_reference_towers_first_merger_gemm(config, norm_merged, impl):
    plan = GridPlan.build(GRIDS, config, DEVICE)
    merger = Merger(config, norm_merged).to(DEVICE).requires_grad_(False)
    merger.norm.weight.normal_()
    bias = getattr(merger.norm, "bias", None)
    x = outlier_randn(plan.num_patches, config.hidden_size)
    joined = ops.merge_norm(
        x, merger.norm.weight, bias, plan.restore_index, config.traits.norm, EPS, norm_merged, impl=impl
    )
    expected = merger(x) if plan.restore_index is None else merger(x)[plan.restore_index]
    torch.testing.assert_close(merger.fc2(merger.act(merger.fc1(joined))), expected, rtol=1e-5, atol=1e-5)


def test_a_token_is_bitwise_the_same_alone_and_in_every_run():
    x, weight = outlier_randn(64, 96, dtype=torch.float16), outlier_randn(96, dtype=torch.float16)
    index = torch.randperm(16).to(DEVICE)
    y = ops.merge_norm(x, weight, None, index, impl="triton")
    assert torch.equal(y, ops.merge_norm(x, weight, None, index, impl="triton"))
    token = int(index[3])
    assert torch.equal(y[3:4], ops.merge_norm(x[4 * token : 4 * token + 4], weight, impl="triton"))


def test_merge_norm_of_other_merge_units_and_of_no_patches():
    x, weight = outlier_randn(18, 40), outlier_randn(40)
    for unit in (1, 9):
        actual = ops.merge_norm(x, weight, merge_unit=unit, impl="triton")
        torch.testing.assert_close(actual, ops.merge_norm(x, weight, merge_unit=unit, impl="reference"))
    assert ops.merge_norm(x[:0], weight, impl="triton").shape == (0, 160)


def merge_with_loops(x, mode, size):
    """Merge token by token and patch by patch; averages in fp64."""
    frames, height, row, _ = x.shape
    rows = [
        [
            [[x[t, size * i + a, size * j + b] for a in range(size) for b in range(size)] for j in range(row // size)]
            for i in range(height // size)
        ]
        for t in range(frames)
    ]
    join = torch.cat if mode == "concat" else lambda block: torch.stack(block).double().mean(0)
    return torch.stack([torch.stack([torch.stack([join(block) for block in row]) for row in frame]) for frame in rows])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 70), st.integers(1, 3), st.integers(0, 5)
)
@pytest.mark.parametrize("mode", ["concat", "average"])
def test_maps_of_any_shape_and_stride(mode, frames, height, row, width, size, offset):
    whole = torch.randn(frames, size * height + offset, size * row + offset, width + offset, device=DEVICE)
    x = whole[:, offset:, offset:, offset:]
    actual = ops.spatial_merge(x, mode, size, impl="triton")
    expected = merge_with_loops(x, mode, size).to(x.dtype)
    if mode == "concat":
        assert torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ops.spatial_merge(x, mode, size, impl="reference"), expected)
    torch.testing.assert_close(ops.spatial_merge(x[0], mode, size, impl="triton"), expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_are_rounded_once(dtype):
    x = outlier_randn(2, 6, 8, 72, dtype=dtype)
    expected = merge_with_loops(x, "average", 2)
    actual, reference = (ops.spatial_merge(x, "average", impl=impl) for impl in ("triton", "reference"))
    assert actual.dtype == dtype
    assert_no_worse(actual, reference, expected)


def test_a_merged_map_equals_patches_joined_in_the_towers_order():
    """Compare `spatial_merge` of a map with joining its patches in the tower's order."""
    plan = GridPlan.build([[1, 6, 10]], QWEN3, DEVICE)
    x = outlier_randn(6, 10, 32)
    patches = x[plan.position_ids[:, 0], plan.position_ids[:, 1]]
    assert torch.equal(ops.spatial_merge(x, impl="triton").flatten(0, 1), patches.reshape(-1, 128))


def test_torch_compile_passes_through():
    x, weight, index = outlier_randn(16, 24), outlier_randn(24), torch.randperm(4).to(DEVICE)

    def both(x):
        return ops.merge_norm(x, weight, None, index, impl="triton"), ops.spatial_merge(
            x.view(4, 4, 24), "average", impl="triton"
        )

    for ours, theirs in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), strict=True):
        assert torch.equal(ours, theirs)
    torch.library.opcheck(torch.ops.qwenvit.merge_norm.default, (x, weight, None, index, "rms", EPS, False, 4))
    for mode in ("concat", "average"):
        torch.library.opcheck(torch.ops.qwenvit.spatial_merge.default, (x.view(1, 4, 4, 24), mode, 2))


X, W, MAP = torch.zeros(8, 6), torch.zeros(6), torch.zeros(2, 4, 6)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"x: expected shape \[any, any\], got \[8\]", lambda: ops.merge_norm(X[:, 0].contiguous(), W)),
        (ValueError, "merge_unit: expected a divisor of x's 7 patches, got 4", lambda: ops.merge_norm(X[:7], W)),
        (ValueError, r"weight: expected shape \[24\], got \[6\]", lambda: ops.merge_norm(X, W, norm_merged=True)),
        (ValueError, r"restore_index: expected shape \[2\]", lambda: ops.merge_norm(X, W, None, torch.arange(8))),
        (TypeError, "restore_index: expected torch.int64", lambda: ops.merge_norm(X, W, None, torch.zeros(2))),
        (ValueError, "x: expected shape .*got", lambda: ops.spatial_merge(X)),
        (ValueError, "merge_size: expected a divisor of H and W", lambda: ops.spatial_merge(MAP, "concat", 3)),
        (ValueError, "mode: expected", lambda: ops.spatial_merge(MAP, "max")),
        (ValueError, "x: expected unit stride", lambda: ops.spatial_merge(MAP.transpose(1, 2), impl="triton")),
        (TypeError, "x: expected a float32", lambda: ops.spatial_merge(MAP.double())),
    ],
)  # fmt: skip
def test_bad_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "kind", "norm_merged"),
    [
        (1280, "rms", False),
        (1280, "layer", False),
        (1152, "layer", False),
        (1152, "layer", True),
        (1024, "layer", True),
    ],
)
@pytest.mark.parametrize("side", [28, 84, 128])
def test_published_shapes(side, width, kind, norm_merged, dtype):
    patches, joined = side**2, 4 * width if norm_merged else width
    x, weight = outlier_randn(patches, width, dtype=dtype), outlier_randn(joined, dtype=dtype)
    bias = outlier_randn(joined, dtype=dtype) if kind == "layer" else None
    y = run_both(x, weight, bias, torch.randperm(patches // 4, device=DEVICE), kind, norm_merged)
    assert y.isfinite().all()
    for mode in ("concat", "average"):
        grid = x.view(side, side, width)
        actual, reference = (ops.spatial_merge(grid, mode, impl=impl) for impl in ("auto", "reference"))
        assert_no_worse(actual, reference, ops.spatial_merge(grid.float(), mode, impl="reference").double())
