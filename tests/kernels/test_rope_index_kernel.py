"""The kernels of rope_index against a brute force: compiled on a GPU, in Triton's interpreter without one."""

import importlib
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peers.rope_index import TIMESTAMP_FAMILIES, vision_ids
from qwenvit import ops
from support.rope_index_truth import FAMILIES, TEXT_IDS, brute_force, random_rows, same, sequence

pytest.importorskip("triton", reason="needs Triton, which exists for Linux alone")
kernels = importlib.import_module("qwenvit.kernels.rope_index")
CHUNK, SCAN = (int(getattr(size, "value", size)) for size in (kernels.CHUNK, kernels.SCAN))
"""The kernels' block sizes; the sizes below are on both sides of them."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD, POISON = 1024, 2**50 + 7  # greater than every position and delta, so that a maximum keeps it


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def family(request):
    """One family without and one with separate frame groups: the kernels know no other difference."""
    return request.param


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Fill all memory that the launcher allocates with poison, and check the guards around it after the test."""
    blocks, new_empty = [], torch.Tensor.new_empty

    def guarded(tensor, size, **options):
        if "device" in options:  # the interpreter's own
            return new_empty(tensor, size, **options)
        shape = torch.Size([size] if isinstance(size, int) else size)
        blocks.append(torch.full((shape.numel() + 2 * GUARD,), POISON, device=tensor.device, **options))
        return blocks[-1][GUARD:-GUARD].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    yield blocks
    assert blocks
    for block in blocks:
        assert (block[:GUARD] == POISON).all()
        assert (block[-GUARD:] == POISON).all()


def kernel(family, inputs, merge=2, tokens_per_second=2, **changes):
    """Return the kernels' result for the inputs of `brute_force`; without token types, from ids."""
    inputs = {key: value.to(DEVICE) for key, value in (inputs | changes).items() if value is not None}
    types = inputs.get("mm_token_type_ids")
    tokens, vision = (inputs["input_ids"], vision_ids(family)) if types is None else (types, (1, 2))
    return ops.rope_index(
        tokens,
        *vision,
        mask=inputs.get("attention_mask"),
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        seconds=inputs.get("second_per_grid_ts"),
        scale=tokens_per_second if family == "qwen2_5_vl" else 1,
        merge=merge,
        frames_apart=family in TIMESTAMP_FAMILIES,
        impl="triton",
    )


def random_row(length, rng, family):
    """Return a row of exactly `length` tokens, with items anywhere."""
    row, remaining = [], length
    while remaining:
        part = rng.choice(["text", "text", "image", "video"])
        if part == "text":
            row.append((part, size := rng.randint(1, min(remaining, 60))))
        else:
            h, w = 2 * rng.randint(1, 9), 2 * rng.randint(1, 9)
            t = 1 if part == "image" or family in TIMESTAMP_FAMILIES else rng.randint(1, 3)
            if (size := t * h * w // 4) > remaining:
                continue
            row.append((part, (t, h, w)))
        remaining -= size
    return row


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 76])
def test_lengths_on_both_sides_of_a_chunk(family, length):
    rng = random.Random(length)
    inputs = sequence([random_row(length, rng, family) for _ in range(3)], family, padding=None)
    assert inputs["mm_token_type_ids"].shape == (3, length)
    same(kernel(family, inputs), brute_force(family, **inputs))
    for padding in ("left", "right", "holes"):
        rows = [random_row(rng.randint(0, length), rng, family), random_row(length, rng, family)]
        inputs = sequence(rows, family, padding=padding, length=length)
        same(kernel(family, inputs), brute_force(family, **inputs))


@pytest.mark.parametrize("before", [CHUNK - 99, CHUNK - 50, CHUNK - 1, CHUNK])
def test_items_across_chunks_and_rows(family, before):
    # An image across a chunk's border, one of 1,350 tokens across several chunks, and vision at both ends of rows.
    long = ("image", (1, 54, 100))
    rows = [
        [("text", before), ("image", (1, 10, 40)), ("video", (2, 8, 6)), ("text", 5), long],
        [long, ("text", before), ("video", (3, 4, 10))],
        [("video", (3, 4, 10)), ("image", (1, 2, 2))],
    ]
    inputs = sequence(rows, family, padding="left")
    same(kernel(family, inputs), brute_force(family, **inputs))


def test_more_grids_than_one_block(family):
    rng = random.Random(1)
    rows = [[("text", 1)], [], []]
    for index in range(3 * SCAN + 20):
        sides = (1, 2 * rng.randint(1, 2), 2 * rng.randint(1, 3))
        rows[rng.choice([0, 1, 1, 2])] += [("video" if index % 2 else "image", sides), ("text", rng.randint(0, 2))]
    rows[2].append(("video", (SCAN + 9, 2, 2)))
    inputs = sequence(rows, family, timestamps=(0, 1))
    assert min(len(inputs["image_grid_thw"]), len(inputs["video_grid_thw"])) > SCAN
    same(kernel(family, inputs), brute_force(family, **inputs))


@pytest.mark.parametrize("grids", [1, 2, 3, SCAN - 1, SCAN, SCAN + 1])
def test_bisection_of_any_number_of_grids(grids):
    row = [("image", (1, 2, 2 * (1 + index % 3))) for index in range(grids)]
    inputs = sequence([row, row], "qwen2_vl", padding=None)
    same(kernel("qwen2_vl", inputs), brute_force("qwen2_vl", **inputs))


def test_more_chunks_than_one_block():
    rng = random.Random(2)
    rows = [random_row(rng.randint(0, 8), rng, "qwen2_vl") for _ in range(SCAN + 5)]  # one chunk per row
    inputs = sequence(rows, "qwen2_vl", padding="ragged", length=8)
    same(kernel("qwen2_vl", inputs), brute_force("qwen2_vl", **inputs))


@pytest.mark.long
def test_one_row_of_more_chunks_than_one_block():
    pair = [("image", (1, 40, 40)), ("text", SCAN * CHUNK // 2)]
    inputs = sequence([[("text", 7)], [*pair, *pair, ("video", (2, 6, 8)), ("text", 300)]], "qwen2_vl")
    assert inputs["mm_token_type_ids"].shape[1] > SCAN * CHUNK
    same(kernel("qwen2_vl", inputs), brute_force("qwen2_vl", **inputs))


BFLOAT16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter has no bfloat16")
)
FLOATS = [torch.float32, torch.float64, torch.float16, BFLOAT16]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8], ids=str)
def test_seconds_of_every_dtype(dtype):
    rows = [
        [("text", 3), ("video", (768, 2, 2)), ("text", 1), ("video", (5, 4, 4))],
        [("video", (40, 2, 2)), ("video", (2, 2, 2))],
    ]
    inputs = sequence(rows, "qwen2_5_vl", padding="left")
    for seconds in ([0.1, 1.3, 3.7, 0.0], [1 / 3, 0.35, 2.3, 33.0]):
        inputs["second_per_grid_ts"] = torch.tensor(seconds).to(dtype)
        for scale in (1, 2, 3, 257) if dtype == torch.bfloat16 else (1, 2, 3):  # bfloat16 cannot represent 257
            same(kernel("qwen2_5_vl", inputs, tokens_per_second=scale),
                 brute_force("qwen2_5_vl", **inputs, tokens_per_second=scale))  # fmt: skip


def test_dtypes_and_strides(family):
    rng = random.Random(3)
    rows = [[("image", (1, 6, 4)), *random_row(40, rng, family)], [("video", (2, 2, 4)), *random_row(33, rng, family)]]
    inputs = sequence(rows, family, padding="ragged")
    expected = brute_force(family, **inputs)
    types, mask = inputs["mm_token_type_ids"], inputs["attention_mask"]
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16):
        same(kernel(family, inputs, attention_mask=mask.to(dtype)), expected)
    for kept in (2, -1, 0.5):  # any value but 0
        same(kernel(family, inputs, attention_mask=mask * kept), expected)
    for dtype in (torch.uint8, torch.int8, torch.int32):
        same(kernel(family, inputs, mm_token_type_ids=types.to(dtype)), expected)
    same(kernel(family, inputs, mm_token_type_ids=None), expected)
    same(kernel(family, inputs, mm_token_type_ids=None, input_ids=inputs["input_ids"].int()), expected)
    for dtype in (torch.int8, torch.int32):
        narrow = {key: inputs[key].to(dtype) for key in ("image_grid_thw", "video_grid_thw")}
        same(kernel(family, inputs, **narrow), expected)
    strided = {key: torch.stack([value, value + 5], -1)[..., 0] for key, value in inputs.items()}
    same(kernel(family, strided), expected)


def test_rows_without_an_unmasked_token(family):
    inputs = sequence([[], [("text", 2), ("image", (1, 4, 4))], [], []], family, length=9)
    same(kernel(family, inputs), brute_force(family, **inputs))
    inputs = sequence([[], []], family, length=CHUNK + 1)
    positions, deltas = kernel(family, inputs)
    assert not positions.any()
    assert deltas.tolist() == [[0], [0]]


@pytest.mark.parametrize("merge", [1, 3])
def test_other_merge_sizes(family, merge):
    rows = [[("image", (1, 6, 12)), ("text", 2), ("video", (3, 12, 6))], [("text", 600)]]
    inputs = sequence(rows, family, merge=merge)
    same(kernel(family, inputs, merge=merge), brute_force(family, **inputs, merge=merge))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_sequences(family):
    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def check(data):
        def integer(low, high):
            return data.draw(st.integers(low, high))

        rows = [*random_rows(integer, touching=True), [("text", 1)]]
        padding = data.draw(st.sampled_from(["left", "right", "holes"]))
        inputs = sequence(rows, family, padding=padding, timestamps=(0, 2), seed=integer(0, 999))
        if family == "qwen2_5_vl" and inputs["video_grid_thw"] is not None:
            videos = len(inputs["video_grid_thw"])
            inputs["second_per_grid_ts"] = torch.tensor([integer(0, 50) / 8 for _ in range(videos)])
        same(kernel(family, inputs), brute_force(family, **inputs))

    check()


def test_results_are_in_poisoned_memory(memory):
    inputs = sequence([[("text", 3)]], "qwen2_vl")
    positions, deltas = kernel("qwen2_vl", inputs)
    starts = {block[GUARD:].data_ptr() for block in memory}
    assert {positions.data_ptr(), deltas.data_ptr()} < starts


INVALID_GRIDS = {
    "too few": lambda grid: grid[:1],
    "none": lambda _: None,
    "empty": lambda grid: grid[:0],
    "too many": lambda grid: grid.repeat(50, 1),
    "zeros": lambda grid: grid * 0,
    "a zero": lambda grid: grid * torch.tensor([1, 0, 1]),
    "odd": lambda grid: grid + 1,
    "negative": lambda grid: -grid,
    "mixed signs": lambda grid: grid * torch.tensor([1, -1, -1]),
    "decreasing": lambda grid: torch.cat([grid, -grid, grid]),
    "large": lambda grid: grid * 1000,
    "past 2**63": lambda grid: grid * 2**40,
    "lowest": lambda grid: grid * 0 - 2**63,
    "highest": lambda grid: grid * 0 + 2**63 - 1,
}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("invalid", INVALID_GRIDS)
def test_invalid_grids_never_write_out_of_bounds(family, invalid):
    rows = [
        [("text", 20), ("image", (1, 8, 8)), ("text", 9), ("video", (2, 6, 6)), ("text", CHUNK)],
        [("text", 30), ("video", (3, 6, 8)), ("text", 4), ("image", (1, 20, 6)), ("image", (1, 2, 2))],
    ]
    inputs = sequence(rows, family, padding="left", length=CHUNK + 90)
    first = [CHUNK + 90 - int(row.sum()) for row in inputs["attention_mask"]]
    changes = {key: INVALID_GRIDS[invalid](inputs[key]) for key in ("image_grid_thw", "video_grid_thw")}
    if family == "qwen2_5_vl":
        videos = changes["video_grid_thw"]
        changes["second_per_grid_ts"] = torch.ones(0 if videos is None else len(videos))
    positions, deltas = kernel(family, inputs, **changes)
    assert positions.shape == (3, 2, CHUNK + 90)
    assert deltas.shape == (2, 1)
    assert (positions != POISON).all()
    assert (deltas != POISON).all()
    # Positions before a row's first vision token do not depend on any grid.
    for row, text in enumerate((20, 30)):
        assert not positions[:, row, : first[row]].any()
        assert (positions[:, row, first[row] : first[row] + text].cpu() == torch.arange(text)).all()


def test_vision_tokens_past_the_last_grid_get_the_position_that_follows_it(family):
    row = [("text", 2), ("image", (1, 4, 6)), ("text", 1), ("image", (1, 4, 4)), ("text", 2)]
    inputs = sequence([row], family)
    positions, deltas = kernel(family, inputs, image_grid_thw=inputs["image_grid_thw"][:1])
    # Text at 0 and 1, an image of 2 x 3 tokens from 2 on, text at 5, four tokens at 6, and text from 6 on.
    assert positions[:, 0, 8:].tolist() == 3 * [[5, 6, 6, 6, 6, 6, 7]]
    assert deltas.tolist() == [[8 - 15]]


def test_text_ids_never_count_as_vision(family):
    ids = torch.arange(TEXT_IDS - 2 * CHUNK, TEXT_IDS)[None]
    positions, deltas = kernel(family, {"input_ids": ids})
    assert (positions.cpu() == torch.arange(2 * CHUNK)).all()
    assert deltas.item() == 0


def test_an_unknown_implementation_is_refused(memory):
    memory.append(torch.full((2 * GUARD,), POISON))  # the call below allocates none
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="impl: expected 'auto', 'triton' or 'reference', got 'fast'"):
        ops.rope_index(tokens, 1, 2, None, None, None, None, 1, 2, False, impl="fast")
