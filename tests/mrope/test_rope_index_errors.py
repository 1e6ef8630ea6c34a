"""rope_index names the argument, what it expected and what it got in each error, and leaves its inputs unchanged."""

import itertools
import math
import random
import re

import pytest
import torch

from qwenvit import rope_index
from support.rope_index_truth import FAMILIES, brute_force, same, sequence
from support.towers import FULL

ROWS = [
    [("text", 2), ("image", (1, 4, 6)), ("text", 2), ("video", (2, 4, 4))],
    [("text", 1), ("image", (1, 2, 4)), ("text", 1)],
]
"""6 and 2 image tokens, 8 video tokens: 18 in the first row, 4 in the second."""
IMAGES, VIDEOS = torch.tensor([[1, 4, 6], [1, 2, 4]]), torch.tensor([[2, 4, 4]])


@pytest.fixture
def inputs():
    return sequence(ROWS, "qwen2_5_vl", junk=False)


def refuses(inputs, error, words, **changes):
    """Assert that the call with `changes` raises `error` with a message that starts with `words`."""
    with pytest.raises(error, match="^" + re.escape(words)):
        rope_index(**{"family": "qwen2_5_vl"} | inputs | changes)


def mismatch(kind, item, size, token, row):
    return (
        f"{kind}_grid_thw: expected a run of {size} {kind} tokens (frame groups x rows x columns) for item {item}, "
        f"got a run that ends before that, at token {token} of row {row}"
    )


def test_the_unchanged_inputs_are_accepted(inputs):
    same(rope_index(family="qwen2_5_vl", **inputs), brute_force("qwen2_5_vl", **inputs))


class TestGridsAndTokens:
    @pytest.mark.parametrize(
        ("key", "grid", "grid_tokens", "tokens"),
        [
            ("image_grid_thw", IMAGES[:1], 6, 8),
            ("image_grid_thw", IMAGES[1:], 2, 8),
            ("image_grid_thw", None, 0, 8),
            ("image_grid_thw", IMAGES[:0], 0, 8),
            ("image_grid_thw", torch.tensor([[1, 4, 6], [1, 2, 4], [1, 2, 2]]), 9, 8),
            ("image_grid_thw", torch.tensor([[1, 4, 6], [2, 2, 4]]), 10, 8),
            ("video_grid_thw", None, 0, 8),
            ("video_grid_thw", torch.tensor([[1, 4, 4]]), 4, 8),
            ("video_grid_thw", torch.tensor([[2, 4, 4], [1, 2, 2]]), 9, 8),
            ("video_grid_thw", torch.tensor([[2**20, 2**20, 2**20]]), 2**58, 8),
        ],
    )
    def test_too_few_or_too_many(self, inputs, key, grid, grid_tokens, tokens):
        kind = key.removesuffix("_grid_thw")
        words = f"{key}: expected grids of {tokens} {kind} tokens in total, got grids of {grid_tokens} ("
        refuses(inputs, ValueError, words, **{key: grid})
        refuses(inputs, ValueError, words, **{key: grid}, mm_token_type_ids=None)
        if kind == "image":  # and in a family with separate frame groups
            rows = [[part for part in row if part[0] != "video"] for row in ROWS]
            refuses(sequence(rows, "qwen3_vl", junk=False), ValueError, words, image_grid_thw=grid, family="qwen3_vl")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_grids_without_any_tokens(self, family):
        inputs = sequence([[("text", 5)]], family)
        for key in ("image_grid_thw", "video_grid_thw"):
            words = f"{key}: expected grids of 0 {key[:5]} tokens in total, got grids of 4 ("
            refuses(inputs, ValueError, words, family=family, **{key: torch.tensor([[1, 4, 4]])})

    def test_huge_grids_neither_overflow_nor_take_memory(self):
        words = f"image_grid_thw: expected grids of 0 image tokens in total, got grids of {2**64} ("
        grid = torch.full((1, 3), 2**22)
        refuses(sequence([[("text", 5)]], "qwen2_vl"), ValueError, words, family="qwen2_vl", image_grid_thw=grid)
        inputs = sequence(ROWS, "qwen3_vl", junk=False)
        words = f"video_grid_thw: expected grids of 8 video tokens in total, got grids of {2**42} ("
        refuses(inputs, ValueError, words, family="qwen3_vl", video_grid_thw=torch.tensor([[2**40, 4, 4]]))

    def test_more_and_fewer_frame_groups(self):
        inputs = sequence(ROWS, "qwen3_vl", junk=False)
        for frames in (1, 3):
            words = f"video_grid_thw: expected grids of 8 video tokens in total, got grids of {4 * frames} ("
            refuses(inputs, ValueError, words, family="qwen3_vl", video_grid_thw=torch.tensor([[frames, 4, 4]]))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_masked_tokens_do_not_count(self, family):
        inputs = sequence(ROWS, family, junk=False)
        inputs["attention_mask"][0, 2:5] = 0
        refuses(inputs, ValueError, "image_grid_thw: expected grids of 5 image tokens in total, got grids of 8 (tokens "
                "that attention_mask masks do not count)", family=family)  # fmt: skip

    @pytest.mark.parametrize(
        ("grid", "item", "size"),
        [
            ([[1, 2, 4], [1, 4, 6]], 1, "1 x 2 x 3"),  # the two swapped
            ([[1, 2, 14], [1, 2, 2]], 0, "1 x 1 x 7"),
            ([[1, 2, 4], [1, 2, 10], [1, 2, 2]], 1, "1 x 1 x 5"),
            ([[1, 4, 4], [1, 4, 4]], 1, "1 x 2 x 2"),
        ],
    )
    def test_equal_totals_but_different_runs(self, inputs, grid, item, size):
        refuses(inputs, ValueError, mismatch("image", item, size, 7, 0), image_grid_thw=torch.tensor(grid))

    def test_touching_items_are_separated(self, inputs):
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 4], [2, 2, 4], [1, 2, 2], [1, 2, 2]])
        same(rope_index(family="qwen2_5_vl", **inputs), brute_force("qwen2_5_vl", **inputs))

    def test_a_run_interrupted_by_text(self):
        # Videos of 4 and 4 tokens against runs of 4, 2 and 2, the last two in the second row, left-padded to 13.
        pair = [("text", 3), ("video", (1, 2, 4)), ("text", 1), ("video", (1, 2, 4))]
        inputs = sequence([[("text", 9), ("video", (1, 4, 4))], pair], "qwen2_vl", padding="left", junk=False)
        grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
        words = mismatch("video", 1, "1 x 2 x 2", 9, 1)
        refuses(inputs, ValueError, words, family="qwen2_vl", video_grid_thw=grid)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("kind", ["image", "video"])
    def test_the_first_item_that_a_run_ends_before_is_named(self, family, kind):
        rng, refused = random.Random(0), 0
        for _ in range(150):
            # Two rows of text and item tokens, a quarter of them masked; grids of 1 to 3 tokens for the rest.
            types = torch.tensor([[rng.choice((0, 1, 1, 1)) for _ in range(7)] for _ in range(2)])
            mask = torch.tensor([[rng.choice((0, 1, 1, 1)) for _ in range(7)] for _ in range(2)])
            places = []  # rank among the unmasked tokens, row and column of each token of an item
            for rank, (row, column) in enumerate(mask.nonzero().tolist()):
                places += [(rank, row, column)] * types[row, column].item()
            sizes = []
            while (rest := len(places) - sum(sizes)) > 0:
                sizes.append(rng.randint(1, min(3, rest)))
            inputs = {
                "mm_token_type_ids": types * (1 if kind == "image" else 2),
                "attention_mask": mask,
                f"{kind}_grid_thw": torch.tensor([[1, 2, 2 * size] for size in sizes]).reshape(-1, 3),
            }
            expected, start = None, 0
            for item, size in enumerate(sizes):
                for (rank, row, column), after in itertools.pairwise(places[start : start + size]):
                    if expected is None and (rank + 1, row) != after[:2]:
                        expected = mismatch(kind, item, f"1 x 1 x {size}", column, row)
                start += size
            if expected is None:
                same(rope_index(family=family, **inputs), brute_force(family, **inputs))
            else:
                refused += 1
                refuses(inputs, ValueError, expected, family=family)
        assert 20 < refused < 130

    def test_a_frame_group_interrupted_by_text(self):
        row = [("video", (2, 2, 4)), ("text", 2), ("video", (1, 2, 4))]
        inputs = sequence([row], "qwen3_5", padding=None, timestamps=(3, 3))
        words = mismatch("video", 0, "1 x 1 x 6", 1, 0)
        refuses(inputs, ValueError, words, family="qwen3_5", video_grid_thw=torch.tensor([[1, 2, 12]]))

    def test_a_run_that_the_end_of_the_row_interrupts(self):
        inputs = sequence([[("image", (1, 4, 4))], [("image", (1, 4, 4))]], "qwen2_vl", padding=None)
        grid = torch.tensor([[1, 2, 4], [1, 4, 4], [1, 2, 4]])
        refuses(inputs, ValueError, mismatch("image", 1, "1 x 2 x 2", 3, 0), image_grid_thw=grid)

    def test_the_token_index_counts_masked_tokens(self):
        # There are masked tokens before and inside the run: it ends at token 6, the fifth unmasked one.
        inputs = {
            "mm_token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 0, 1, 0, 1]]),
            "attention_mask": torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1, 1]]),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        refuses(inputs, ValueError, mismatch("image", 0, "1 x 2 x 2", 6, 0))


class TestValues:
    @pytest.mark.parametrize("key", ["image_grid_thw", "video_grid_thw"])
    @pytest.mark.parametrize("size", [[0, 4, 4], [1, 0, 4], [1, 4, 0], [-1, 2, -4], [1, -2, -4], [1, 5, 4], [1, 4, 7]])
    def test_sizes(self, inputs, key, size):
        grid = inputs[key].clone()
        grid[-1] = torch.tensor(size)
        words = f"{key}: expected positive sizes, rows and columns divisible by 2, got {size} for item {len(grid) - 1}"
        refuses(inputs, ValueError, words, **{key: grid})

    def test_sizes_not_divisible_by_the_merge_size(self, inputs):
        words = "image_grid_thw: expected positive sizes, rows and columns divisible by 3, got [1, 4, 6] for item 0"
        refuses(inputs, ValueError, words, spatial_merge_size=3)

    @pytest.mark.parametrize("invalid", [3, -1, 255])
    def test_token_types(self, inputs, invalid):
        types = inputs["mm_token_type_ids"].clone()
        types[1, -1] = invalid
        same(rope_index(family="qwen2_5_vl", **inputs | {"mm_token_type_ids": types}),
             brute_force("qwen2_5_vl", **inputs))  # masked, so ignored  # fmt: skip
        types[1, 0] = invalid
        words = f"mm_token_type_ids: expected 0 (text), 1 (image) or 2 (video), got {invalid}"
        refuses(inputs, ValueError, words, mm_token_type_ids=types)
        refuses(inputs, ValueError, words, mm_token_type_ids=types, attention_mask=None)

    @pytest.mark.parametrize("second", [-1.0, float("nan"), float("inf"), -0.5, 2.0**31, 2.0**100])
    @pytest.mark.parametrize("form", [list, torch.tensor])
    def test_seconds(self, inputs, second, form):
        words = f"second_per_grid_ts: expected seconds, 0 or more, got {second} for video 0"
        refuses(inputs, ValueError, words, second_per_grid_ts=form([second]))

    @pytest.mark.parametrize("wrong", [0, 1, 2])
    @pytest.mark.parametrize("form", [list, torch.tensor])
    def test_the_video_of_wrong_seconds_is_named(self, wrong, form):
        inputs = sequence([[("video", (1, 2, 2)), ("text", 1)] * 3], "qwen2_5_vl", padding=None)
        words = f"second_per_grid_ts: expected seconds, 0 or more, got -1.0 for video {wrong}"
        seconds = [-1.0 if video == wrong else 1.5 for video in range(3)]
        refuses(inputs, ValueError, words, second_per_grid_ts=form(seconds))

    def test_the_most_seconds(self, inputs):
        largest = [torch.tensor([math.nextafter(2.0**31, 0)], dtype=torch.float64), torch.tensor([2**31 - 1])]
        largest.append(torch.tensor([2.0**31]).nextafter(torch.zeros(1)))
        for second in [torch.zeros(1), *largest]:
            arguments = inputs | {"second_per_grid_ts": second}
            same(rope_index(family="qwen2_5_vl", **arguments), brute_force("qwen2_5_vl", **arguments))
        words = f"second_per_grid_ts: expected seconds, 0 or more, got {2.0**31} for video 0"
        refuses(inputs, ValueError, words, second_per_grid_ts=torch.tensor([2**31]))


class TestShapesKindsAndDevices:
    @pytest.mark.parametrize(
        ("key", "value", "error", "words"),
        [
            ("image_grid_thw", IMAGES.tolist(), TypeError, "expected a tensor, got list"),
            ("image_grid_thw", IMAGES.numpy(), TypeError, "expected a tensor, got ndarray"),
            ("image_grid_thw", 3, TypeError, "expected a tensor, got int"),
            ("image_grid_thw", torch.tensor(3), ValueError, "expected shape"),
            ("image_grid_thw", IMAGES[0], ValueError, "expected shape [3, 3], got [3]"),
            ("video_grid_thw", VIDEOS[:, :2], ValueError, "expected shape [1, 3], got [1, 2]"),
            ("video_grid_thw", VIDEOS[None], ValueError, "expected shape [1, 3], got [1, 1, 3]"),
            ("video_grid_thw", VIDEOS.float(), ValueError, "expected integers, got torch.float32"),
            ("image_grid_thw", IMAGES.bool(), ValueError, "expected integers, got torch.bool"),
            ("image_grid_thw", IMAGES.to(torch.complex64), ValueError, "expected integers, got torch.complex64"),
            ("image_grid_thw", IMAGES.to("meta"), ValueError, "expected device cpu, that of the tokens, got meta"),
            ("video_grid_thw", VIDEOS.to("meta"), ValueError, "expected device cpu, that of the tokens, got meta"),
            ("attention_mask", [[1] * 18] * 2, TypeError, "expected a tensor, got list"),
            ("attention_mask", torch.ones(2, 17), ValueError, "expected shape [2, 18], got [2, 17]"),
            ("attention_mask", torch.ones(18), ValueError, "expected shape [2, 18], got [18]"),
            ("attention_mask", torch.ones(2, 1, 18, 18), ValueError, "expected shape [2, 18], got [2, 1, 18, 18]"),
            ("attention_mask", torch.ones(2, 18, device="meta"), ValueError, "expected device cpu, that of the"),
            ("mm_token_type_ids", [[0] * 18] * 2, TypeError, "expected a tensor [batch, sequence], got list"),
            ("mm_token_type_ids", torch.zeros(2, 18), ValueError, "expected integers [batch, sequence]"),
            ("mm_token_type_ids", torch.zeros(18).long(), ValueError, "expected integers [batch, sequence]"),
            ("mm_token_type_ids", torch.zeros(2, 9).long(), ValueError, "expected shape [2, 18], got [2, 9]"),
            ("input_ids", [[0] * 18] * 2, TypeError, "expected a tensor [batch, sequence], got list"),
            ("second_per_grid_ts", [1.0, 2.0], ValueError, "expected shape [1], got [2]"),
            ("second_per_grid_ts", [], ValueError, "expected shape [1], got [0]"),
            ("second_per_grid_ts", torch.ones(2), ValueError, "expected shape [1], got [2]"),
            ("second_per_grid_ts", torch.ones(1, 1), ValueError, "expected shape [1], got [1, 1]"),
            ("second_per_grid_ts", torch.tensor(1.0), ValueError, "expected shape [1], got []"),
            ("second_per_grid_ts", 1.0, TypeError, ""),
            (
                "second_per_grid_ts",
                torch.ones(1).to(torch.complex64),
                ValueError,
                "expected floating-point or integer numbers",
            ),
            ("attention_mask", torch.ones(2, 18, dtype=torch.complex64), ValueError, "expected a real dtype, got"),
            ("second_per_grid_ts", ["a"], (TypeError, ValueError), ""),
            ("second_per_grid_ts", [None], (TypeError, ValueError), ""),
            ("second_per_grid_ts", torch.ones(1, device="meta"), ValueError, "expected device cpu"),
        ],
    )
    def test_refused(self, inputs, key, value, error, words):
        refuses(inputs, error, f"{key}: {words}", **{key: value})

    @pytest.mark.parametrize(
        "ids",
        [torch.zeros(shape, dtype=torch.int64) for shape in [(0, 5), (2, 0), (5,), (1, 2, 3)]]
        + [torch.zeros(2, 5, dtype=dtype) for dtype in (torch.float32, torch.bool, torch.complex64)],
        ids=lambda ids: f"{list(ids.shape)} {ids.dtype}",
    )
    def test_tokens(self, ids):
        words = f"expected integers [batch, sequence], at least one, got {list(ids.shape)} {ids.dtype}"
        refuses({}, ValueError, f"input_ids: {words}", input_ids=ids)
        refuses({}, ValueError, f"mm_token_type_ids: {words}", mm_token_type_ids=ids)

    def test_no_tokens(self):
        refuses({}, ValueError, "input_ids: expected input_ids or mm_token_type_ids, got neither")

    def test_seconds_without_videos(self):
        inputs = sequence([[("text", 3)]], "qwen2_5_vl")
        refuses(inputs, ValueError, "second_per_grid_ts: expected shape [0], got [1]", second_per_grid_ts=[1.0])


class TestRules:
    @pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
    def test_a_time_scale_for_a_family_without_one(self, family):
        inputs = sequence(ROWS, family, junk=False) | {"family": family}
        words = "second_per_grid_ts: expected None, since only qwen2_5_vl positions frame groups by seconds"
        refuses(inputs, ValueError, words, second_per_grid_ts=[1.0])
        refuses(inputs, ValueError, words, second_per_grid_ts=torch.ones(1))
        words = f"tokens_per_second: expected None, since {family} has no time scale, got 2"
        refuses(inputs, ValueError, words, tokens_per_second=2)

    @pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni", "qwen4", ""])
    def test_other_families(self, inputs, name):
        words = f"family: expected one of qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, got {name!r}"
        for family in [name, FULL.get(name, name), {"model_type": name}]:
            refuses(inputs, ValueError, words, family=family)

    @pytest.mark.parametrize(
        "family", [None, 3, {}, {"vision_config": {}}, {"model_type": ["x"]}, torch.nn.Identity()], ids=str
    )
    def test_neither_a_family_nor_a_config(self, inputs, family):
        words = f"family: expected a name, VisionConfig or transformers config, got {type(family).__name__}"
        refuses(inputs, TypeError, words, family=family)

    @pytest.mark.parametrize("key", ["tokens_per_second", "spatial_merge_size"])
    @pytest.mark.parametrize("value", [0, -1, 2.5, True, "2"])
    def test_positive_integers(self, inputs, key, value):
        words = f"{key}: expected a positive integer, got {value!r}"
        refuses(inputs, ValueError, words, **{key: value})
        refuses(inputs, ValueError, words, family={"model_type": "qwen2_5_vl", "vision_config": {key: value}})

    @pytest.mark.parametrize("key", ["image_token_id", "video_token_id"])
    @pytest.mark.parametrize("value", [2.5, "x", True, torch.tensor(5)])
    def test_ids_that_are_not_integers(self, inputs, key, value):
        refuses(inputs, (TypeError, ValueError), f"{key}: ", mm_token_type_ids=None, **{key: value})

    def test_equal_ids(self, inputs):
        words = "video_token_id: expected an id different from image_token_id, got "
        refuses(inputs, ValueError, words + "7 for both", image_token_id=7, video_token_id=7)
        refuses(inputs, ValueError, words + "151655 for both", video_token_id=151655)
        config = {"model_type": "qwen2_5_vl", "image_token_id": 9, "video_token_id": 9}
        refuses(inputs, ValueError, words + "9 for both", family=config)


@pytest.mark.parametrize("validate", [None, True, False])
def test_the_cpu_validates_whatever_validate_says(inputs, validate):
    refuses(inputs, ValueError, "image_grid_thw: expected grids of 8", image_grid_thw=IMAGES[:1], validate=validate)
    refuses(inputs, ValueError, "video_grid_thw: expected positive", video_grid_thw=-VIDEOS, validate=validate)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", ["ragged", "holes"])
@pytest.mark.parametrize("tokens", ["input_ids", "mm_token_type_ids"])
def test_inputs_stay_unchanged(family, padding, tokens):
    inputs = sequence(ROWS, family, padding=padding, length=40)
    inputs[tokens] = None
    if family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([1.5])
    before = {key: value.clone() for key, value in inputs.items() if value is not None}
    positions, deltas = rope_index(family=family, **inputs)
    positions.fill_(-7)  # would change an input that shares memory with the result
    deltas.fill_(-7)
    assert all(torch.equal(inputs[key], value) for key, value in before.items())
