"""Older versions of transformers differ from 5.23, which rope_index follows: one difference per test.

All expected positions are computed by hand. Comments give the results of 4.57.6 and 5.17.0 for the same inputs; 5.17
differs only in that it truncates seconds.
"""

import pytest
import torch

from qwenvit import rope_index


def positions_and_delta(family, types, mask=None, **inputs):
    """Return the positions on each axis of a batch of one, and its delta."""
    mask = None if mask is None else torch.tensor([mask])
    inputs = {key: torch.tensor(value) for key, value in inputs.items()}
    tokens = torch.tensor([types])
    positions, deltas = rope_index(family=family, mm_token_type_ids=tokens, attention_mask=mask, **inputs)
    return *positions[:, 0].tolist(), deltas.item()


def test_text_after_a_video_starts_after_its_longer_side_unlike_4_57():
    # Six frame groups of 1 x 2 tokens from position 1 on: text continues at 1 + 2. In 4.57 at 7, after the last group.
    t, h, w, delta = positions_and_delta("qwen2_vl", [0] + 12 * [2] + [0, 0], video_grid_thw=[[6, 2, 4]])
    assert t == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 3, 4]
    assert h == [0] + 12 * [1] + [3, 4]
    assert w == [0] + 6 * [1, 2] + [3, 4]
    assert delta == 6 + 1 - 15  # 4.57: 8 + 1 - 15


def test_text_after_a_video_in_seconds_starts_after_its_longer_side_unlike_4_57():
    # Three frame groups, two positions apart: the last is at 1 + 4, text continues at 1 + 2. In 4.57 at 6.
    t, h, _, delta = positions_and_delta(
        "qwen2_5_vl", [0] + 6 * [2] + [0, 0], video_grid_thw=[[3, 2, 4]], second_per_grid_ts=[1.0]
    )
    assert t == [0, 1, 1, 3, 3, 5, 5, 3, 4]
    assert h == [0] + 6 * [1] + [3, 4]
    assert delta == 5 + 1 - 9  # 4.57: 7 + 1 - 9


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_padding_has_position_0_unlike_1_in_4_57(family):
    *axes, _ = positions_and_delta(family, [0, 0, 0, 1, 0], mask=[0, 0, 1, 1, 1], image_grid_thw=[[1, 2, 2]])
    assert axes == 3 * [[0, 0, 0, 1, 2]]  # 4.57: 1, 1, 0, 1, 2
    *axes, _ = positions_and_delta(family, [0, 0, 0], mask=[1, 1, 0])
    assert axes == 3 * [[0, 1, 0]]  # 4.57: 0, 1, 1


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [
        (1.5, [0, 3, 6]),  # 4.57 and 5.17: 0, 2, 4
        (0.5, [0, 1, 2]),  # 4.57 and 5.17: 0, 0, 0
        (0.75, [0, 1, 3]),  # 4.57 and 5.17: 0, 0, 0
    ],
)
def test_fractional_seconds_are_kept_unlike_4_57_and_5_17(seconds, frames):
    t, h, _, delta = positions_and_delta(
        "qwen2_5_vl", [0, 2, 2, 2, 0], video_grid_thw=[[3, 2, 2]], second_per_grid_ts=[seconds]
    )
    assert t == [0, *(1 + frame for frame in frames), 2]
    assert h == [0, 1, 1, 1, 2]
    assert delta == max(2, 1 + frames[-1]) + 1 - 5


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_the_delta_is_relative_to_the_unmasked_length_unlike_4_57(family):
    # Text, 2 x 2 image tokens and text: the next position is 4, after 6 tokens. 4.57 also counts the padding: 4 - 8.
    types, grid = [0, 1, 1, 1, 1, 0], [[1, 4, 4]]
    for before, after in [(0, 0), (2, 0), (0, 2), (1, 1)]:
        mask = [0] * before + 6 * [1] + [0] * after
        *_, delta = positions_and_delta(family, [0] * before + types + [0] * after, mask=mask, image_grid_thw=grid)
        assert delta == 4 - 6
    # Also without any vision, where it is 0. 4.57: -2
    *_, delta = positions_and_delta(family, [0] * 5, mask=[0, 0, 1, 1, 1])
    assert delta == 0


def test_frame_groups_of_an_image_advance_in_time_unlike_qwen2_5_vl_in_4_57():
    # Four frame groups of one token each; tokens_per_second does not apply to images. 4.57 puts all at time 1.
    t, h, _, delta = positions_and_delta("qwen2_5_vl", [0, 1, 1, 1, 1, 0, 0], image_grid_thw=[[4, 2, 2]])
    assert t == [0, 1, 2, 3, 4, 2, 3]
    assert h == [0, 1, 1, 1, 1, 2, 3]
    assert delta == 4 + 1 - 7  # 4.57: 3 + 1 - 7
