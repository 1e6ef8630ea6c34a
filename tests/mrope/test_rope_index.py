"""rope_index on a CPU against transformers' own get_rope_index."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from peers.rope_index import SETUPS, processor_inputs, transformers_rope_index, vision_ids
from qwenvit import rope_index
from qwenvit.mrope.rules import PUBLISHED_RULES
from support.pinned import needs_pinned_transformers
from support.rope_index_truth import FAMILIES, same, sequence
from support.towers import FULL

ROWS = [
    [("text", 5), ("image", (1, 6, 8)), ("text", 3), ("video", (3, 4, 6)), ("text", 2)],
    [("video", (2, 8, 4)), ("image", (1, 2, 2)), ("text", 4), ("image", (2, 6, 4)), ("video", (5, 2, 2))],
    [("text", 9)],
    [("image", (1, 10, 2)), ("text", 1), ("image", (1, 2, 10)), ("video", (4, 2, 4)), ("text", 30)],
]
"""Vision first, last, and directly after the other modality; an image of two frame groups; a row of text alone."""
SECONDS = [0.5, 1.3, 1 / 3, 40.7]
"""Seconds between the frame groups of each video of `ROWS`."""
CONFIGS = {
    "qwen2_vl": "Qwen2VLConfig",
    "qwen2_5_vl": "Qwen2_5_VLConfig",
    "qwen3_vl": "Qwen3VLConfig",
    "qwen3_vl_moe": "Qwen3VLMoeConfig",
    "qwen3_5": "Qwen3_5Config",
}


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def assert_equals_transformers(family, inputs, **scale):
    same(rope_index(family=family, **inputs, **scale), transformers_rope_index(family, **inputs, **scale))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", SETUPS)
def test_batches_of_realistic_size(family, name, padding):
    assert_equals_transformers(family, processor_inputs(name, family, padding=padding))


@pytest.mark.parametrize("padding", ["left", "right", "ragged", "holes"])
def test_padding(family, padding):
    assert_equals_transformers(family, sequence(ROWS, family, padding=padding, length=100))


def test_no_mask(family):
    lengths = [sequence([row], family, timestamps=(6, 6))["input_ids"].shape[1] for row in ROWS]
    rows = [[*row, ("text", max(lengths) - length)] for row, length in zip(ROWS, lengths, strict=True)]
    inputs = sequence(rows, family, padding=None, timestamps=(6, 6))
    assert inputs["attention_mask"] is None
    assert_equals_transformers(family, inputs)


@pytest.mark.parametrize("padding", ["left", "right", None])
def test_no_vision(family, padding):
    rows = [[("text", 12)], [("text", 12 if padding is None else 7)]]
    assert_equals_transformers(family, sequence(rows, family, padding=padding))


def test_one_token_images(family):
    row = [("text", 2)] + [("image", (1, 2, 2)), ("text", 1)] * 20 + [("video", (1, 2, 2))]
    assert_equals_transformers(
        family, sequence([row, row[2:], [("image", (1, 2, 2))], [("video", (1, 2, 2))]], family, padding="ragged")
    )


def test_ids_and_types_alone_and_together(family):
    inputs = sequence(ROWS, family)
    expected = transformers_rope_index(family, **inputs)
    types = inputs.pop("mm_token_type_ids")
    same(rope_index(family=family, **inputs), expected)
    ids = inputs.pop("input_ids")
    same(rope_index(family=family, mm_token_type_ids=types, **inputs), expected)
    # With both, the types decide, as in transformers: ids may have any values, vision ids too.
    image, video = vision_ids(family)
    for other in (torch.zeros_like(ids), torch.full_like(ids, image), torch.full_like(ids, video)):
        same(rope_index(family=family, input_ids=other, mm_token_type_ids=types, **inputs), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int32, torch.float32], ids=str)
def test_integer_dtypes_and_mask_dtypes(family, dtype, mask_dtype):
    inputs = sequence(ROWS, family, padding="ragged", length=90)
    expected = transformers_rope_index(family, **inputs)  # transformers itself refuses int32 tokens with a mask
    inputs = {key: tensor.to(dtype) for key, tensor in inputs.items()}
    inputs["attention_mask"] = inputs["attention_mask"].to(mask_dtype)
    same(rope_index(family=family, **inputs), expected)
    del inputs["mm_token_type_ids"]
    same(rope_index(family=family, **inputs), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_floating_masks(family, dtype):
    inputs = sequence(ROWS, family, padding="ragged", length=90)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    assert_equals_transformers(family, inputs)


def test_under_compile(family):
    # The call breaks the graph, as transformers' own function does.
    inputs = sequence(ROWS, family, padding="left", length=90)
    compiled = torch.compile(lambda types, mask: rope_index(family=family, **inputs | {
        "mm_token_type_ids": types, "attention_mask": mask}), backend="eager")  # fmt: skip
    same(compiled(inputs["mm_token_type_ids"], inputs["attention_mask"]), transformers_rope_index(family, **inputs))


def test_every_mask_value_but_0_keeps_a_token(family):
    inputs = sequence(ROWS, family, padding="ragged", length=90)
    mask = inputs["attention_mask"].float()
    for value in (2, -1, 0.5, float("-inf")):
        inputs["attention_mask"] = torch.where(mask > 0, value, 0.0)
        assert_equals_transformers(family, inputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16], ids=str)
def test_types_and_grids_of_few_bits(family, dtype):
    inputs = sequence(ROWS, family, padding="ragged", length=90)
    expected = transformers_rope_index(family, **inputs)
    for key in ("mm_token_type_ids", "image_grid_thw", "video_grid_thw"):
        inputs[key] = inputs[key].to(dtype)
    same(rope_index(family=family, **inputs), expected)


def test_large_items_with_grids_of_few_bits(family):
    # Every size of 3 x 100 x 120 patches fits into a byte, but their product does not.
    inputs = sequence([[("image", (3, 100, 120)), ("text", 3), ("video", (3, 100, 120)), ("text", 2)]], family)
    expected = transformers_rope_index(family, **inputs)
    for key in ("image_grid_thw", "video_grid_thw"):
        inputs[key] = inputs[key].to(torch.int8)
    same(rope_index(family=family, **inputs), expected)


def test_inputs_may_be_strided(family):
    inputs = sequence(ROWS, family, padding="ragged", length=90)
    expected = transformers_rope_index(family, **inputs)
    for key, tensor in inputs.items():
        inputs[key] = torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]
        assert not inputs[key].is_contiguous()
    same(rope_index(family=family, **inputs), expected)
    for key in ("mm_token_type_ids", "input_ids", "attention_mask"):
        inputs[key] = inputs[key].t().contiguous().t()
    same(rope_index(family=family, **inputs), expected)


@needs_pinned_transformers
@pytest.mark.parametrize(
    "seconds",
    [
        None,
        SECONDS,
        [1, 2, 3, 4],
        torch.tensor(SECONDS),
        torch.tensor(SECONDS, dtype=torch.float64),
        torch.tensor(SECONDS, dtype=torch.bfloat16),
        torch.tensor(SECONDS, dtype=torch.float16),
        torch.tensor([1, 2, 3, 40]),
        torch.tensor([1, 2, 3, 40], dtype=torch.int32),
        torch.tensor(SECONDS + SECONDS)[::2],
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
@pytest.mark.parametrize("tokens_per_second", [2, 25, 257])
def test_seconds_between_frame_groups(seconds, tokens_per_second):
    inputs = sequence(ROWS, "qwen2_5_vl", padding="ragged", length=90)
    assert_equals_transformers(
        "qwen2_5_vl", inputs | {"second_per_grid_ts": seconds}, tokens_per_second=tokens_per_second
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16], ids=str)
def test_whole_seconds_in_few_bits(dtype):
    # The last of 100 frame groups is at 99 x 2 x 3 = 594, which does not fit into 8 bits.
    inputs = sequence([[("text", 2), ("video", (100, 2, 2)), ("text", 2)]], "qwen2_5_vl")
    assert_equals_transformers("qwen2_5_vl", inputs | {"second_per_grid_ts": torch.tensor([3], dtype=dtype)})


SECONDS_FORMS = {
    "list": lambda second: [second],
    "tuple": lambda second: (second,),
    "array": lambda second: np.array([second]),
    "float32 array": lambda second: np.array([second], np.float32),
    "list of numpy's": lambda second: [np.float32(second)],
    "list of tensors": lambda second: [torch.tensor(second)],
} | {str(dtype): lambda second, dtype=dtype: torch.tensor([second], dtype=dtype) for dtype in FLOATS}


@needs_pinned_transformers
@pytest.mark.parametrize("form", SECONDS_FORMS)
@pytest.mark.parametrize("seconds", [0.1, 0.35, 1 / 3, 2.3])
def test_rounding_over_long_videos(form, seconds):
    # With 768 frame groups, products rounded in different dtypes fall on either side of integers.
    inputs = sequence([[("text", 3), ("video", (768, 2, 4)), ("text", 5)]], "qwen2_5_vl")
    given = SECONDS_FORMS[form](seconds)
    for scale in (1, 2, 3, 10):
        assert_equals_transformers("qwen2_5_vl", inputs | {"second_per_grid_ts": given}, tokens_per_second=scale)


def test_the_time_axis_may_determine_the_delta():
    rows = [[("text", 3), ("video", (6, 4, 4)), ("text", 2)], [("video", (9, 4, 4)), ("text", 2)], [("text", 5)]]
    inputs = sequence(rows, "qwen2_5_vl", padding="left") | {"second_per_grid_ts": torch.tensor([100.0, 3.0])}
    assert_equals_transformers("qwen2_5_vl", inputs, tokens_per_second=4)
    _, deltas = rope_index(family="qwen2_5_vl", **inputs, tokens_per_second=4)
    # By hand: the last frame group is at 3 + 5 * 400; plus 1, minus 3 + 24 + 2 tokens. And 8 * 12 + 1 - 38.
    assert deltas.tolist() == [[1975], [59], [0]]


def test_frame_groups_without_seconds_may_determine_the_delta():
    # More frame groups than rows and columns, and less text after them than frame groups.
    assert_equals_transformers("qwen2_vl", sequence([[("text", 3), ("video", (90, 2, 2)), ("text", 1)]], "qwen2_vl"))
    assert_equals_transformers(
        "qwen2_5_vl", sequence([[("text", 3), ("image", (90, 2, 2)), ("text", 1)]], "qwen2_5_vl")
    )


class TestFamily:
    """The accepted forms of `family`."""

    @pytest.mark.parametrize("name", CONFIGS)
    @pytest.mark.parametrize("form", ["object", "dict", "read from json"])
    def test_transformers_config_with_its_own_values(self, name, form, tmp_path):
        vision = {"spatial_merge_size": 3} | ({"tokens_per_second": 5} if name == "qwen2_5_vl" else {})
        config = config_class(name)(image_token_id=150_001, video_token_id=150_002, vision_config=vision)
        inputs = relabelled(name, sequence(divisible_by_3(ROWS), name, merge=3), 150_001, 150_002)
        expected = transformers_rope_index(name, **inputs, merge=3, tokens_per_second=5)
        if form == "dict":
            config = config.to_dict()
        elif form == "read from json":
            config.save_pretrained(tmp_path)
            config = type(config).from_pretrained(tmp_path)
        del inputs["mm_token_type_ids"]  # so that ids mark vision tokens
        same(rope_index(family=config, **inputs), expected)

    def test_the_vision_config_of_a_transformers_config(self, family):
        config = config_class(family)(vision_config={"spatial_merge_size": 3}).vision_config
        inputs = sequence(divisible_by_3(ROWS), family, merge=3)
        scale = getattr(config, "tokens_per_second", 2)
        expected = transformers_rope_index(family, **inputs, merge=3, tokens_per_second=scale)
        same(rope_index(family=config, **inputs), expected)
        same(rope_index(family=config.to_dict(), **inputs), expected)

    def test_vision_config(self, family):
        config = replace(FULL[family], spatial_merge_size=1)
        if family == "qwen2_5_vl":
            config = replace(config, tokens_per_second=7)
        inputs = sequence(ROWS, family, merge=1)
        same(
            rope_index(family=config, **inputs),
            transformers_rope_index(family, **inputs, merge=1, tokens_per_second=7),
        )

    def test_arguments_override_the_config(self, family):
        scale = {"tokens_per_second": 3} if family == "qwen2_5_vl" else {}
        inputs = relabelled(family, sequence(divisible_by_3(ROWS), family, merge=3), 11, 12)
        expected = transformers_rope_index(family, **inputs, merge=3, tokens_per_second=3)
        del inputs["mm_token_type_ids"]
        ids = {"image_token_id": 11, "video_token_id": 12}
        for config in (family, FULL[family], config_class(family)()):
            same(rope_index(family=config, **inputs, **ids, **scale, spatial_merge_size=3), expected)

    @pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
    def test_default_ids_are_the_published_ids(self, name):
        module = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
        class_name = CONFIGS.get(name, "Qwen3_5MoeConfig")
        config = getattr(module, class_name)()
        rules = PUBLISHED_RULES[name.removesuffix("_moe")]
        assert (rules.image_token_id, rules.video_token_id) == (config.image_token_id, config.video_token_id)
        assert rules.spatial_merge_size == config.vision_config.spatial_merge_size

    def test_default_time_scale_is_the_published_scale(self):
        # The default of transformers' class is 4; the config.json of every Qwen2.5-VL has 2.
        inputs = sequence([[("video", (3, 2, 2))]], "qwen2_5_vl")
        assert rope_index(family="qwen2_5_vl", **inputs)[0][0].tolist() == [[0, 2, 4]]
        assert rope_index(family=config_class("qwen2_5_vl")(), **inputs)[0][0].tolist() == [[0, 4, 8]]


def config_class(name):
    return getattr(importlib.import_module(f"transformers.models.{name}.configuration_{name}"), CONFIGS[name])


def divisible_by_3(rows):
    """Return the rows with image and video sides divisible by 3."""
    return [[(part, size if part == "text" else (size[0], size[1] // 2 * 3, size[2] // 2 * 3)) for part, size in row]
            for row in rows]  # fmt: skip


def relabelled(family, inputs, image_token_id, video_token_id):
    """Return the sequence with other ids for vision, and with the published vision ids as its text."""
    published = torch.tensor(vision_ids(family))
    ids = published[torch.arange(inputs["input_ids"].numel()) % 2].view_as(inputs["input_ids"])
    ids[inputs["mm_token_type_ids"] == 1] = image_token_id
    ids[inputs["mm_token_type_ids"] == 2] = video_token_id
    return inputs | {"input_ids": ids}
