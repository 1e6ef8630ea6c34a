"""Attention on Hopper: without a GPU, how it compiles; on one, its results against fp64 and torch, and bit for bit.

As a script, this file compiles the kernel as its launcher would and prints ptxas' reports, one JSON line per kernel.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qwenvit.kernels.attention import hopper
from qwenvit.kernels.attention.hopper import hopper_attention
from qwenvit.kernels.attention.hopper_producer import KV_EMPTY
from qwenvit.kernels.attention.hopper_scheduler import saves_a_wave, tile_heights, tile_heights_of_batch
from qwenvit.ops import reference as plain_torch
from support.errors import error
from support.rope_attention_cases import DRIFTS, HEAD_DIMS, packed, packed_with_drift, poisoned, truth

DTYPES = (torch.bfloat16, torch.float16)
ACROSS_HEADS_LENGTH = 3136
"""Tokens of a segment whose tiles continue across heads, with 132 programs and 16 heads."""
MAX_SPILLED = 32 if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9) else 320
"""Most bytes that ptxas may spill: once a tile, none in the loop over keys. Triton 3.9's ptxas spills more."""
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0")
LAYOUTS = {
    "448 px": [1024],
    "odd": [1765],
    "frames": [784] * 6,
    "windows": [64] * 40 + [4, 12],
    "single": [1] * 300,
    "edges": [0, 1, 63, 64, 65, 127, 128, 129, 0, 0, 191, 192, 193, 0],
    "empty ones in 1200": [5, 0, 70] * 400,
    "nothing after the first": [200, 0, 0, 0],
    "4 to 4000": [4 + 7919 * i % 3997 for i in range(12)],
}


def attend_without_a_gpu(dtype):
    """Call the launcher with every head_dim, for tiles of one head and for tiles that continue across heads."""
    with mock.patch.object(hopper, "_multiprocessors", return_value=132):
        for head_dim in HEAD_DIMS:
            for rows in (256, ACROSS_HEADS_LENGTH):
                out = torch.zeros(rows, 16, head_dim, dtype=dtype)
                hopper_attention(out, out, out, torch.tensor([0, rows], dtype=torch.int32), 1.0, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
def test_compiles_with_few_spills_and_no_serialised_products(dtype, tmp_path):
    # In a process of its own, because Triton chooses between compiler and interpreter once per process.
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0", "PYTHONPATH": paths}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, __file__, str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [row for row in compiled if row["kernel"] == "_hopper_attention"]
    assert {row["kernel"] for row in compiled} == {"_hopper_attention", "_pad_with_ones"}
    assert len(rows) == 2 * len(HEAD_DIMS)
    for row in rows:
        assert row["shared"] <= 227 * 1024, row
        assert row["fp_fusion"], row
        assert row["spilled"] <= MAX_SPILLED, row
        assert 0 < max(row["barriers"]) < KV_EMPTY.value, row  # from KV_EMPTY on barriers are the kernel's own
        assert "Performance Loss" not in row["report"], row  # C7512: products serialised for lack of registers


def test_tiles_continue_across_heads_where_that_saves_a_wave():
    across_heads = [n_units for n_units in range(1, 200) if saves_a_wave(64 * n_units, 16, 132)]
    assert across_heads == [49, 73, 74, 148, 172, 173]
    assert saves_a_wave(ACROSS_HEADS_LENGTH - 63, 16, 132)
    for n_units in across_heads:
        tall_units, n_tall_heads = tile_heights.fn(64 * n_units, 1, 16, 132)
        heights = [3, 2][: tall_units - 1]
        tiles = [n_tall_heads * -(-n_units // heights[0]), (16 - n_tall_heads) * -(-n_units // heights[1])]
        assert -(-sum(tiles) // 132) == -(-16 * n_units // (3 * 132)) + 1


@pytest.mark.parametrize("n_segments", [1, 2, 16, 300])
@pytest.mark.parametrize("length", [1, 64, 784, 1024, 1764, 2304, 3136, 4096, 7056, 9216, 24336, 65536])
def test_tile_heights(n_segments, length):
    """With equal segments the busiest program has no more units than it would with tall tiles alone."""
    n_heads = 16 * n_segments
    tall_units, n_tall_heads = tile_heights.fn(length * n_segments, n_segments, 16, 132)
    assert 1 <= tall_units <= 3
    assert 0 <= n_tall_heads <= n_heads

    def busiest_units(tall_units, n_tall_heads):
        n_units, short_units = -(-length // 64), max(tall_units - 1, 1)
        n_tiles = n_tall_heads * -(-n_units // tall_units), (n_heads - n_tall_heads) * -(-n_units // short_units)
        tiles = [tall_units] * n_tiles[0] + [short_units] * n_tiles[1]
        return sum(tiles[::132])

    assert busiest_units(tall_units, n_tall_heads) <= busiest_units(3, n_heads)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


def attend(q, k, v, bounds):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    with poisoned():
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    hopper_attention(q, k, v, cu_seqlens, q.shape[2] ** -0.5, out)
    return out


def reference(q, k, v, bounds):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    return plain_torch.rope_attention(q, k, v, None, None, cu_seqlens, q.shape[2] ** -0.5, False)


def assert_close_to_truth(q, k, v, bounds):
    right = truth(q, k, v, None, None, bounds)
    ours, theirs = error(attend(q, k, v, bounds), right), error(reference(q, k, v, bounds), right)
    assert ours <= 1.05 * theirs, (ours, theirs)


@needs_hopper
@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, head_dim, case):
    bounds = cumulative(LAYOUTS[case])
    assert_close_to_truth(*packed(bounds[-1], 16 if bounds[-1] < 5000 else 3, head_dim, dtype, "cuda"), bounds)


@needs_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_thousand_random_layouts(head_dim):
    generator = torch.Generator().manual_seed(head_dim)

    def random_below(end):
        return int(torch.randint(end, (), generator=generator))

    for seed in range(1000):
        # Few long segments are scheduled longest first.
        limits, most = ((2, 10, 150, 1200), 50) if seed % 4 else ((2, 150, 4000, 4000), 8)
        bounds = cumulative([random_below(limits[random_below(4)]) for _ in range(1 + random_below(most))])
        if bounds[-1] == 0:
            continue
        heads, padding = 1 + random_below(16), random_below(200)
        programs = 1 + random_below((10, 132, 500)[random_below(3)])
        if seed % 5 == 0:  # one segment, whose tiles may continue across heads
            bounds = [0, bounds[-1]]
        q, k, v = packed(bounds[-1] + padding, heads, head_dim, torch.bfloat16, "cuda", seed=seed)
        with (
            mock.patch.object(hopper, "_multiprocessors", return_value=programs),  # other tiles, for other programs
            mock.patch.object(hopper, "saves_a_wave", return_value=seed % 2 == 0),
        ):
            out = attend(q, k, v, bounds + [bounds[-1]] * (random_below(20) if seed % 5 else 0))
        right = truth(*(x[: bounds[-1]] for x in (q, k, v)), None, None, bounds)
        assert error(out[: bounds[-1]], right) < 8e-3, (bounds, heads, padding, programs)
        assert out[bounds[-1] :].isnan().all()


@needs_hopper
@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_drift(dtype, head_dim, drift):
    """Maxima are replaced where scores outgrow them, and sums and outputs rescaled."""
    assert_close_to_truth(*packed_with_drift(1500, 3, head_dim, dtype, drift, "cuda"), [0, 600, 1500])


@needs_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_strides_and_parts(head_dim):
    bounds = [0, 6, 70, 134, 170]
    q = torch.randn(3, 170, head_dim, device="cuda").bfloat16().transpose(0, 1)
    k = torch.randn(170, 3 * head_dim + 1, device="cuda").bfloat16()[:, 1:].unflatten(1, (3, head_dim))
    v = torch.randn(170, 3, head_dim + 16, device="cuda").bfloat16()[..., 3 : head_dim + 3]
    assert_close_to_truth(q, k, v, bounds)
    expanded = q[:, :1].expand(170, 3, head_dim)
    assert_close_to_truth(expanded, expanded, v, bounds)
    assert_close_to_truth(q[:, :1], k[:, 1:2], v[:, 2:], bounds)
    if head_dim > 64:  # two tensors, the second padded, as `rotate_by_head` returns them
        rest = torch.nn.functional.pad(q[..., 64:], (0, 80 - head_dim))
        out = torch.empty(170, 3, head_dim, dtype=q.dtype, device="cuda")
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        hopper_attention((q[..., :64].contiguous(), rest), k, v, cu_seqlens, head_dim**-0.5, out)
        assert torch.equal(out, attend(q, k, v, bounds))


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_with_ones_beside_them(dtype):
    """As a packed projection has them: nothing is copied, and the bits are those of padded copies."""
    bounds = [0, 6, 70, 134, 1170]
    projection = torch.full((1170, 16 * (2 * 72 + 80)), torch.nan, dtype=dtype, device="cuda")
    q, k = projection[:, : 32 * 72].unflatten(1, (2, 16, 72)).unbind(1)
    v = projection[:, 32 * 72 :].unflatten(1, (16, 80))
    for x, values in zip((q, k, v), packed(1170, 16, 72, dtype, "cuda"), strict=True):
        x[..., :72] = values
    v[..., 72:] = 1
    expected = attend(q, k, v[..., :72].contiguous(), bounds)
    copies = mock.Mock(side_effect=AssertionError("a copy"))
    with mock.patch.object(hopper, "pad_with_ones", copies), mock.patch.object(hopper, "contiguous_copy", copies):
        assert torch.equal(attend(q, k, v, bounds), expected)
    assert_close_to_truth(q, k, v[..., :72].contiguous(), bounds)


@needs_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_again_alone_and_with_other_tiles(dtype, head_dim):
    bounds = cumulative([1000, 3, 64, 0, 777, 128, 2500, 31])
    q, k, v = packed(bounds[-1], 16, head_dim, dtype, "cuda")
    first = attend(q, k, v, bounds)
    for _ in range(10):
        assert torch.equal(attend(q, k, v, bounds), first)
    for programs in (1, 5, 33, 100, 700, 10000):
        with mock.patch.object(hopper, "_multiprocessors", return_value=programs):
            assert torch.equal(attend(q, k, v, bounds), first)
    for start, end in pairwise(bounds):
        if end > start:
            alone = attend(q[start:end], k[start:end], v[start:end], [0, end - start])
            assert torch.equal(alone, first[start:end])


@needs_hopper
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_neighbours_that_are_not_finite(head_dim):
    bounds = [0, 10, 70, 199, 200, 330, 331]
    q, k, v = (x.clone() for x in packed(331, 2, head_dim, torch.bfloat16, "cuda"))
    right = attend(q, k, v, bounds)
    for x in (q, k, v):
        x[:10], x[70:200], x[330] = float("inf"), float("nan"), float("-inf")
    out = attend(q, k, v, bounds)
    assert torch.equal(out[10:70], right[10:70])
    assert torch.equal(out[200:330], right[200:330])


@needs_hopper
@pytest.mark.parametrize(("programs", "heads"), [(132, 16), (7, 16), (5, 3)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_that_continue_across_heads(dtype, head_dim, programs, heads):
    """They give the same bits as tiles of one head, also where most of the rows are padding."""
    q, k, v = packed(ACROSS_HEADS_LENGTH, heads, head_dim, dtype, "cuda")
    for length in (0, 1, 64, 65, 128, 129, 191, 193, 1000, ACROSS_HEADS_LENGTH - 63, ACROSS_HEADS_LENGTH):
        outs = []
        for across_heads in (False, True):
            with (
                mock.patch.object(hopper, "_multiprocessors", return_value=programs),
                mock.patch.object(hopper, "saves_a_wave", return_value=across_heads),
            ):
                outs += [attend(q, k, v, [0, length]) for _ in range(3)]
        assert all(torch.equal(out[:length], outs[0][:length]) for out in outs[1:])
        assert all(out[length:].isnan().all() for out in outs)


@gluon.jit
def _store_tile_heights(out_ptr, cu_seqlens_ptr, n_segments, n_rows, n_heads):
    tall_units, n_tall_heads, _ = tile_heights_of_batch(cu_seqlens_ptr, n_segments, n_rows, n_heads)
    gl.store(out_ptr, tall_units)
    gl.store(out_ptr + 1, n_tall_heads)


@needs_hopper
@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.parametrize("empty", [0, 1, 300])
def test_heights_on_the_device(heads, empty):
    """The device chooses heights for the actual tokens and segments, not for the capacity."""
    out = torch.zeros(2, dtype=torch.int32, device="cuda")
    for n_segments in (1, 2, 5, 127, 128, 129, 300):
        for length in (1, 64, 65, 784, 1024, 3136, 7056, 24336):
            bounds = cumulative([length + i % 3 for i in range(n_segments)] + [0] * empty)
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
            _store_tile_heights[(132,)](out, cu_seqlens, len(bounds) - 1, bounds[-1] + 1000, heads, num_warps=1)
            assert tuple(out.tolist()) == tile_heights.fn(bounds[-1], n_segments, heads, 132)


if __name__ == "__main__":
    from support.compile_ahead import compile_calls

    for row in compile_calls(90, lambda: attend_without_a_gpu(getattr(torch, sys.argv[1]))):
        print(json.dumps(row))
