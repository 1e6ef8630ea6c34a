"""Embeddings that a receiver would take and turn into nonsense: every exporter refuses them, naming the item."""

import re
from dataclasses import replace

import pytest
import torch

from qwenvit.exports import sglang as sglang_export
from qwenvit.exports import transformers, vllm
from qwenvit.outputs import Embeddings
from support.embeddings import embeddings
from support.towers import SMALL

CONFIG = SMALL["qwen3_vl"]
WIDTH, LEVELS = CONFIG.out_hidden_size, len(CONFIG.deepstack_visual_indexes)
EXPORTERS = {
    "transformers": transformers.to_transformers,
    "vllm": vllm.to_vllm,
    "vllm message": vllm.to_vllm_message,
    "sglang": sglang_export.to_sglang,
}


def spoiled(**changes):
    items = list(embeddings())
    return [items[0], replace(items[1], **changes)]


def with_nan(tensor, value=float("nan")):
    tensor = tensor.clone()
    tensor[-1, -1] = value
    return tensor


WHOLE = embeddings()[1]
WRONG = {
    "width": (
        {"tokens": WHOLE.tokens[:, :-1]},
        f"tokens of shape [8, {WIDTH}] for its grid 1x4x2, got [8, {WIDTH - 1}]",
    ),
    "count": ({"tokens": WHOLE.tokens[1:]}, f"tokens of shape [8, {WIDTH}] for its grid 1x4x2, got [7, {WIDTH}]"),
    "grid": ({"grid": (1, 4, 3)}, f"tokens of shape [12, {WIDTH}] for its grid 1x4x3, got [8, {WIDTH}]"),
    "NaN": ({"tokens": with_nan(WHOLE.tokens)}, "finite tokens, got NaN or infinity"),
    "infinity": ({"tokens": with_nan(WHOLE.tokens, float("-inf"))}, "finite tokens, got NaN or infinity"),
    "whole numbers": ({"tokens": WHOLE.tokens.int()}, "tokens in one floating dtype with its tokens, got torch.int32"),
    "no DeepStack": ({"deepstack": []}, f"{LEVELS} DeepStack features, got 0"),
    "DeepStack's width": (
        {"deepstack": [*WHOLE.deepstack[:-1], WHOLE.deepstack[-1][:, 1:]]},
        f"deepstack[{LEVELS - 1}] of shape [8, {WIDTH}]",
    ),
    "DeepStack's NaN": ({"deepstack": [with_nan(WHOLE.deepstack[0]), *WHOLE.deepstack[1:]]}, "finite deepstack[0]"),
    "DeepStack's dtype": (
        {"deepstack": [WHOLE.deepstack[0].half(), *WHOLE.deepstack[1:]]},
        "deepstack[0] in one floating dtype with its tokens, got torch.float16",
    ),
    "another tower": ({"config": replace(CONFIG, depth=CONFIG.depth + 1)}, "the tower of item 0"),
}


@pytest.mark.parametrize("export", EXPORTERS.values(), ids=EXPORTERS)
@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_every_exporter_refuses_what_does_not_fit(export, changes, message):
    with pytest.raises(ValueError, match=re.escape("item 1: expected ") + ".*" + re.escape(message)):
        export(spoiled(**changes))


@pytest.mark.parametrize("export", EXPORTERS.values(), ids=EXPORTERS)
def test_nothing_and_skipped_items_are_refused(export):
    with pytest.raises(ValueError, match="at least one item"):
        export([])
    with pytest.raises(ValueError, match="item 1: expected embeddings, got None"):
        export(embeddings(skipped=[1]))


def test_the_methods_check_too(tmp_path):
    item = replace(WHOLE, tokens=with_nan(WHOLE.tokens))
    for export in (item.to_transformers, item.to_vllm, item.to_vllm_message, item.to_sglang):
        with pytest.raises(ValueError, match="item 0: expected finite tokens"):
            export()
    with pytest.raises(ValueError, match="item 0: expected finite tokens"):
        item.save_vllm_cache(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []


RECEIVER = {"model_type": "qwen3_vl", "vision_config": CONFIG.to_hf(), "image_token_id": 7, "video_token_id": 8}


def ids(*runs):
    """Return text, and between it runs of a token."""
    return [1, *(one for token, count in runs for one in [*[token] * count, 2])]


def test_a_prompt_that_fits():
    embeddings().check_receiver(RECEIVER)
    embeddings().check_receiver(RECEIVER, ids((7, 6), (7, 8)))
    embeddings().check_receiver(RECEIVER, torch.tensor([[*ids((7, 6)), 0, 0], ids((7, 8))]))
    rows_that_touch = torch.tensor([[1, 2, *[7] * 6], [*[7] * 8]])
    embeddings().check_receiver(RECEIVER, rows_that_touch)
    video = embeddings([(3, 4, 6)], video=True)
    video.check_receiver(RECEIVER, ids((8, 6), (8, 6), (8, 6)))
    video.check_receiver(RECEIVER, ids((8, 18)))
    Embeddings.concatenate([embeddings(), video]).check_receiver(RECEIVER, ids((7, 6), (8, 18), (7, 8)))
    omni = embeddings(config=SMALL["qwen2_5_omni"])
    thinker = {"vision_config": omni.config.to_hf(), "image_token_index": 7, "video_token_index": 8}
    omni.check_receiver({"model_type": "qwen2_5_omni", "thinker_config": thinker}, ids((7, 6), (7, 8)))


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (ids((7, 6), (7, 7)), "item 1: expected 8 placeholders of the image (token 7)"),
        (ids((7, 8), (7, 6)), "item 0: expected 6 placeholders"),  # as many in all
        (ids((7, 6)), "item 1: expected 8 placeholders of the image (token 7) in input_ids for its grid 1x4x2, got 0"),
        (ids((7, 6), (7, 8), (7, 2)), "no more image placeholders (token 7), got 2 without item"),
        (ids((7, 6), (7, 8), (8, 2)), "no more video placeholders (token 8), got 2 without item"),
        (ids((7, 14)), "item 0: expected 6 placeholders"),
    ],
)
def test_a_prompt_that_does_not_fit(input_ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        embeddings().check_receiver(RECEIVER, input_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_hidden_size": WIDTH + 8}, f"out_hidden_size={WIDTH}, got {WIDTH + 8}"),
        ({"depth": CONFIG.depth + 1}, f"depth={CONFIG.depth}"),
        ({"deepstack_visual_indexes": (1,)}, "deepstack_visual_indexes="),
        ({"spatial_merge_size": 1}, "spatial_merge_size=2, got 1"),
    ],
)
def test_a_model_of_another_tower(change, message):
    config = RECEIVER | {"vision_config": replace(CONFIG, **change).to_hf()}
    with pytest.raises(ValueError, match=re.escape(message)):
        embeddings().check_receiver(config)


def test_a_model_of_another_family_or_no_model():
    other = {"model_type": "qwen2_vl", "vision_config": SMALL["qwen2_vl"].to_hf()}
    with pytest.raises(ValueError, match="family=qwen3_vl, got qwen2_vl"):
        embeddings().check_receiver(other)
    with pytest.raises(ValueError, match="expected a whole model's config with image_token_id"):
        embeddings().check_receiver(CONFIG.to_hf(), ids((7, 6), (7, 8)))
    with pytest.raises(TypeError, match="expected a transformers config or its dict, got int"):
        embeddings().check_receiver(3)
