"""rope_index on random sequences: equal to transformers, and to a brute force where transformers refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peers.rope_index import transformers_rope_index
from qwenvit import rope_index
from support.pinned import needs_pinned_transformers
from support.rope_index_truth import FAMILIES, brute_force, random_rows, same, sequence

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: at these sizes, several threads only wait for each other."""
    torch.set_num_threads(1)


@st.composite
def sequences(draw, family, touching=False):
    """Draw a random batch: the arguments of `brute_force` and `transformers_rope_index`, without the family."""

    def integer(low, high):
        return draw(st.integers(low, high))

    merge = draw(st.sampled_from([2, 1, 3]))
    rows = random_rows(integer, touching=touching, merge=merge)
    inputs = sequence(
        [*rows, [("text", 1)]],
        family,
        padding=draw(st.sampled_from(["left", "right", "ragged", "holes"])),
        timestamps=(0, 2) if touching else (1, 9),
        merge=merge,
        seed=integer(0, 10**6),
    )
    if family == "qwen2_5_vl":
        videos = 0 if inputs["video_grid_thw"] is None else len(inputs["video_grid_thw"])
        seconds = draw(st.lists(st.floats(0, 50), min_size=videos, max_size=videos))
        dtype = draw(st.sampled_from([None, list, *DTYPES]))
        if dtype is not None:
            inputs["second_per_grid_ts"] = seconds if dtype is list else torch.tensor(seconds, dtype=dtype)
        inputs["tokens_per_second"] = draw(st.sampled_from([2, 1, 25]))
    return inputs | {"merge": merge}


def ours(family, inputs):
    inputs = dict(inputs)
    return rope_index(family=family, spatial_merge_size=inputs.pop("merge"), **inputs)


@needs_pinned_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family):
    @settings(max_examples=600, deadline=None)
    @given(sequences(family))
    def check(inputs):
        expected = transformers_rope_index(family, **inputs)
        same(ours(family, inputs), expected)
        del inputs["mm_token_type_ids"]
        same(ours(family, inputs), expected)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_touching_items_holes_and_empty_rows_equal_brute_force(family):
    @settings(max_examples=400, deadline=None)
    @given(sequences(family, touching=True))
    def check(inputs):
        same(ours(family, inputs), brute_force(family, **inputs))

    check()


@needs_pinned_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_brute_force_equals_transformers(family):
    @settings(max_examples=50, deadline=None)
    @given(sequences(family))
    def check(inputs):
        same(brute_force(family, **inputs), transformers_rope_index(family, **inputs))

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_touching_items_by_hand(family):
    images = [("image", (1, 2, 4)), ("image", (1, 4, 2)), ("image", (1, 2, 2))]
    inputs = sequence([[("text", 1), *images, ("text", 1)], []], family, padding="left")
    positions, deltas = rope_index(family=family, **inputs)
    # One text token at 0; 1 x 2 tokens from 1, 2 x 1 from 3, one at 5, and text at 6; the second row is padding.
    assert positions[0, 0].tolist() == [0, 1, 1, 3, 3, 5, 6]
    assert positions[1, 0].tolist() == [0, 1, 1, 3, 4, 5, 6]
    assert positions[2, 0].tolist() == [0, 1, 2, 3, 3, 5, 6]
    assert deltas.tolist() == [[0], [0]]
    assert not positions[:, 1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_items_touch_across_masked_tokens_and_across_rows(family):
    # The first row ends and the second starts with an image; there are masked tokens between and inside images.
    rows = [[("image", (1, 4, 4)), ("image", (1, 6, 4))], [("image", (1, 4, 4)), ("image", (1, 2, 2))]]
    for seed in range(20):
        inputs = sequence(rows, family, padding="holes", length=14, seed=seed)
        same(rope_index(family=family, **inputs), brute_force(family, **inputs))
    inputs = sequence([rows[0], rows[0]], family, padding=None)
    same(rope_index(family=family, **inputs), brute_force(family, **inputs))


def test_every_row_masked():
    for family in FAMILIES:
        inputs = sequence([[], []], family, length=6)
        positions, deltas = rope_index(family=family, **inputs)
        assert positions.tolist() == torch.zeros(3, 2, 6).tolist()
        assert deltas.tolist() == [[0], [0]]
