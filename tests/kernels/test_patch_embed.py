"""Patch embedding and learned positions: against the reference tower and fp64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit import VisionConfig, ops
from qwenvit.parity import ERROR_FACTOR, Difference
from qwenvit.plan.grid_plan import GridPlan
from qwenvit.towers.reference import ReferenceTower

pytestmark = pytest.mark.usefixtures("outputs_full_of_nan")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
GRIDS = [[1, 4, 6], [2, 2, 4], [1, 2, 2]]
QWEN2_5 = VisionConfig("qwen2_5_vl", 1, 72, 72, 2, 64, "silu", 6, window_size=24, fullatt_block_indexes=(0,))
QWEN3 = VisionConfig("qwen3_vl", 1, 72, 72, 2, 64, "gelu_pytorch_tanh", 6, num_position_embeddings=81)
TOWERS = {"qwen2_vl": replace(QWEN3, family="qwen2_vl", hidden_act="quick_gelu", num_position_embeddings=None)}
TOWERS |= {"qwen2_5_vl": QWEN2_5, "qwen3_vl": QWEN3}


interpreter_only = pytest.mark.skipif(GPU, reason="on a GPU so few rows run cuBLAS, as the reference does")


def outlier_randn(*shape, dtype=torch.float32):
    x = torch.randn(*shape, device=DEVICE)
    x[..., :: max(shape[-1] // 5, 1)] *= 100
    return x.to(dtype)


def make_positions(grids, side, width, dtype):
    """Return a table of learned positions, and the taps and weights of the patches of `grids` in it."""
    plan = GridPlan.build(grids, replace(QWEN3, num_position_embeddings=side**2), DEVICE)
    return outlier_randn(side**2, width, dtype=dtype), plan.position_taps, plan.position_weights


def make_restore_index(patches):
    return torch.randperm(patches // 4).to(DEVICE)


def truth(pixel_values, weight, bias, table, taps, tap_weights, restore_index):
    """Compute the patch embedding in fp64, from pixel values rounded to the weight's dtype."""
    x = pixel_values.to(weight.dtype).double() @ weight.double().T
    x = x if bias is None else x + bias.double()
    if table is not None:
        x = x + torch.einsum("pt,ptc->pc", tap_weights.double(), table.double()[taps])
    return x if restore_index is None else torch.cat([x[4 * i : 4 * i + 4] for i in restore_index.argsort().tolist()])


def assert_no_worse(actual, reference, expected):
    """Assert an error of at most ERROR_FACTOR times plain torch's, or of 2 fp32 epsilons: sums may differ in order."""
    error = Difference.of(actual, expected).relative_l2
    floor = 2 * torch.finfo(torch.float32).eps
    assert error <= max(ERROR_FACTOR * Difference.of(reference, expected).relative_l2, floor)


def check_patch_embed(pixel_values, weight, bias, positions, restore_index):
    arguments = (pixel_values, weight, bias, *positions, restore_index)
    actual, reference = (ops.patch_embed(*arguments, impl=impl) for impl in ("triton", "reference"))
    assert actual.shape == reference.shape
    assert actual.dtype == reference.dtype == weight.dtype
    assert_no_worse(actual, reference, truth(*arguments))
    return actual


@interpreter_only
@pytest.mark.parametrize("pixel_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("reorder", [True, False])
def test_error_is_at_most_torchs(reorder, learned, dtype, pixel_dtype):
    grids, width, patch_dim = GRIDS, 72, 216
    patches = sum(t * h * w for t, h, w in grids)
    pixel_values = outlier_randn(patches, patch_dim, dtype=pixel_dtype)
    weight = outlier_randn(width, patch_dim, dtype=dtype) / 16
    positions = make_positions(grids, 9, width, dtype) if learned else (None, None, None)
    bias = outlier_randn(width, dtype=dtype) if learned else None
    check_patch_embed(pixel_values, weight, bias, positions, make_restore_index(patches) if reorder else None)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("name", TOWERS)
def test_it_matches_the_reference_towers_first_hidden_states(name, impl):
    config = TOWERS[name]
    tower = ReferenceTower(config).to(DEVICE).requires_grad_(False)
    plan = GridPlan.build(GRIDS, config, DEVICE)
    pixel_values = torch.randn(plan.num_patches, config.patch_dim, device=DEVICE)
    first = []
    tower.blocks[0].register_forward_pre_hook(lambda _, arguments: first.append(arguments[0]))
    with torch.backends.cudnn.flags(allow_tf32=False):
        tower(pixel_values, plan)
    actual = ops.patch_embed(
        pixel_values,
        tower.patch_embed.proj.weight.flatten(1),
        tower.patch_embed.proj.bias,
        tower.pos_embed.weight if hasattr(tower, "pos_embed") else None,
        plan.position_taps,
        plan.position_weights,
        plan.restore_index,
        impl=impl,
    )
    torch.testing.assert_close(actual, first[0], rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 90), st.integers(1, 90), st.integers(0, 7))
def test_any_shape_and_padded_weights(patches, width, patch_dim, padding):
    pixel_values = torch.randn(patches, patch_dim, device=DEVICE)
    weight = torch.randn(width, patch_dim + padding, device=DEVICE)[:, :patch_dim]
    actual = ops.patch_embed(pixel_values, weight, impl="triton")
    torch.testing.assert_close(actual, pixel_values @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [72, 768, 1152])
def test_positions_alone_and_added(width, dtype):
    table, taps, tap_weights = make_positions(GRIDS, 48, width, dtype)
    alone, reference = (
        ops.interpolate_positions(table, taps, tap_weights, impl=impl) for impl in ("triton", "reference")
    )
    expected = torch.einsum("pt,ptc->pc", tap_weights.double(), table.double()[taps])
    assert_no_worse(alone, reference, expected)
    x, index = outlier_randn(len(taps), width, dtype=dtype), make_restore_index(len(taps))
    before = x.clone()
    for order in (None, index):
        added, reference = (
            ops.add_positions(x, table, taps, tap_weights, order, impl=impl) for impl in ("triton", "reference")
        )
        total = x.double() + expected
        total = total if order is None else total.unflatten(0, (-1, 4))[order.argsort()].flatten(0, 1)
        assert_no_worse(added, reference, total)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_patch_is_bitwise_the_same_alone_and_in_every_run(dtype):
    table, taps, tap_weights = make_positions(GRIDS, 9, 96, dtype)
    x = outlier_randn(len(taps), 96, dtype=dtype)
    y = ops.add_positions(x, table, taps, tap_weights, impl="triton")
    assert torch.equal(y, ops.add_positions(x, table, taps, tap_weights, impl="triton"))
    assert torch.equal(y[5:6], ops.add_positions(x[5:6], table, taps[5:6], tap_weights[5:6], impl="triton"))
    pixel_values, weight = outlier_randn(70, 216, dtype=dtype), outlier_randn(96, 216, dtype=dtype)
    y = ops.patch_embed(pixel_values, weight, impl="triton")
    assert torch.equal(y, ops.patch_embed(pixel_values, weight, impl="triton"))


def test_torch_compile_passes_through():
    table, taps, tap_weights = make_positions([[1, 2, 4]], 9, 24, torch.float32)
    pixel_values = torch.randn(len(taps), 30, device=DEVICE)
    weight, bias = outlier_randn(24, 30), outlier_randn(24)
    index = make_restore_index(len(taps))

    def embed_add_and_interpolate(pixel_values):
        x = ops.patch_embed(pixel_values, weight, bias, table, taps, tap_weights, index, impl="triton")
        return ops.add_positions(x, table, taps, tap_weights, impl="triton") + ops.interpolate_positions(
            table, taps, tap_weights, impl="triton"
        )

    compiled = torch.compile(embed_add_and_interpolate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixel_values), embed_add_and_interpolate(pixel_values))
    qwenvit = torch.ops.qwenvit
    everything = (pixel_values, weight, bias, table, taps, tap_weights, index, 4)
    torch.library.opcheck(qwenvit.patch_embed.default, everything)
    torch.library.opcheck(qwenvit.interpolate_positions.default, (table, taps, tap_weights))
    x = outlier_randn(len(taps), 24)
    torch.library.opcheck(qwenvit.add_positions.default, (x, table, taps, tap_weights, index, 4))


PIXELS, WEIGHT, TABLE = torch.zeros(8, 6), torch.zeros(5, 6), torch.zeros(9, 5)
TAPS, TAP_WEIGHTS = torch.zeros(8, 4, dtype=torch.int64), torch.zeros(8, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "weight: expected a float32, bfloat16 or float16", (PIXELS, WEIGHT.int())),
        (ValueError, "weight: expected shape .* unit stride", (PIXELS, torch.zeros(6, 5).t())),
        (ValueError, r"pixel_values: expected shape \[any, 6\], got \[8, 5\]", (PIXELS[:, :5].contiguous(), WEIGHT)),
        (TypeError, "bias: expected torch.float32, got torch.float16", (PIXELS, WEIGHT, torch.zeros(5).half())),
        (ValueError, "table, taps, tap_weights: expected all three or none, got table", (PIXELS, WEIGHT, None, TABLE)),
        (ValueError, r"table: expected shape \[any, 5\]", (PIXELS, WEIGHT, None, torch.zeros(9, 6), TAPS, TAP_WEIGHTS)),
        (
            ValueError,
            r"taps: expected shape \[8, 4\], got \[7, 4\]",
            (PIXELS, WEIGHT, None, TABLE, TAPS[:7], TAP_WEIGHTS[:7]),
        ),
        (TypeError, "taps: expected torch.int64", (PIXELS, WEIGHT, None, TABLE, TAPS.int(), TAP_WEIGHTS)),
        (TypeError, "tap_weights: expected torch.float32", (PIXELS, WEIGHT, None, TABLE, TAPS, TAP_WEIGHTS.half())),
        (ValueError, r"restore_index: expected shape \[2\]", (PIXELS, WEIGHT, None, None, None, None, torch.arange(8))),
        (ValueError, "merge_unit: expected a divisor", (PIXELS, WEIGHT, None, None, None, None, torch.arange(8), 3)),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_bad_arguments(impl, error, message, arguments):
    with pytest.raises(error, match=message):
        ops.patch_embed(*arguments, impl=impl)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("pixel_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("patch_dim", "width", "learned"), [(1176, 1280, False), (1536, 1152, True), (1536, 768, True)]
)
@pytest.mark.parametrize("side", [28, 84, 96])
def test_published_shapes(side, patch_dim, width, learned, dtype, pixel_dtype):
    grids = [[1, side, side], [1, 2, 6]]
    patches = side**2 + 12
    pixel_values = torch.randn(patches, patch_dim, device=DEVICE).to(pixel_dtype)
    weight = outlier_randn(width, patch_dim, dtype=dtype) / 32
    weight = torch.nn.functional.pad(weight, (0, -patch_dim % 64))[:, :patch_dim]  # row strides that TMA can read
    positions = make_positions(grids, 48, width, dtype) if learned else (None, None, None)
    bias = outlier_randn(width, dtype=dtype) if learned else None
    check_patch_embed(pixel_values, weight, bias, positions, None if learned else make_restore_index(patches))
