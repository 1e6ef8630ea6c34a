"""Attention on Hopper without a GPU: tiles, barriers, copies and masks, in any order of events."""

import random
from itertools import groupby
from unittest import mock

import pytest
import torch

from support import gluon_on_cpu
from support.errors import error
from support.rope_attention_cases import DRIFTS, HEAD_DIMS, packed, packed_with_drift, truth

LAYOUTS = {
    "one": [450],
    "less than a tile": [3],
    "a unit": [64],
    "two units": [100],
    "edges": [0, 1, 63, 64, 65, 0, 127, 128, 129, 0],
    "different lengths": [300, 5, 0, 129, 1],
    "empty": [0, 0],
}


def attend(lengths, heads, head_dim, programs, across_heads, seed=0, padding=0, dtype=torch.bfloat16, drift=None):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    end = int(bounds[-1])
    q, k, v = packed(end + padding, heads, head_dim, dtype, "cpu")
    if drift is not None:
        q, k, v = packed_with_drift(end + padding, heads, head_dim, dtype, drift, "cpu")
    out = torch.full((end + padding, heads, head_dim), torch.nan, dtype=dtype)
    gluon_on_cpu.attend(q, k, v, bounds.int(), head_dim**-0.5, out, programs, across_heads, seed)
    assert out[end:].isnan().all()
    right = truth(q[:end], k[:end], v[:end], None, None, bounds.tolist())
    assert error(out[:end], right) < 8e-3
    return out[:end]


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_layouts(head_dim, case):
    attend(LAYOUTS[case], 2, head_dim, 3, False, padding=70, dtype=torch.float16)


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scores_that_drift(head_dim, drift):
    """Maxima are replaced where scores outgrow them, and sums and outputs rescaled."""
    attend([600], 1, head_dim, 1, False, drift=drift)


@pytest.mark.parametrize(
    ("lengths", "order"),
    [
        ([700, 900], [1, 0]),
        ([64, 64, 2000], [2, 0, 1]),
        ([10, 700, 700, 700], [1, 2, 3, 0]),
        ([300, 0, 1400, 5], [0, 2, 3]),  # on average below 512 tokens: in memory's order
        ([0, 1024, 0, 1024], [1, 3]),  # equally long
    ],
)
def test_the_longest_segments_come_first_where_segments_are_long(lengths, order):
    ends, copy = [], gluon_on_cpu.Machine.copy

    def spy(machine, descriptors, first, rest, full, i_row, end, *others):
        ends.append(int(end))
        copy(machine, descriptors, first, rest, full, i_row, end, *others)

    with mock.patch.object(gluon_on_cpu.Machine, "copy", spy):
        attend(lengths, 1, 64, 1, False)
    assert [end for end, _ in groupby(ends)] == [sum(lengths[: i + 1]) for i in order]


@pytest.mark.parametrize(("lengths", "head_dim"), [([700, 900], 72), ([10, 700, 700, 700], 80)])
def test_longest_segments_first_among_several_programs_and_heads(lengths, head_dim):
    attend(lengths, 2, head_dim, 3, False, padding=70)


@pytest.mark.parametrize("length", [0, 3, 64, 65, 129, 300, 450])
def test_tiles_that_continue_across_heads(length):
    """They give the same bits as tiles of one head, with any number of programs."""
    expected = attend([length], 3, 80, 1, False)
    for seed, programs in enumerate((1, 2, 5)):
        assert torch.equal(attend([length], 3, 80, programs, True, seed, padding=200), expected)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events(seed):
    generator = random.Random(seed)
    lengths = [
        generator.choice((0, 10, 100, 200, 400)) + generator.randrange(70) for _ in range(generator.randint(1, 4))
    ]
    across_heads = seed % 2 == 0
    heads, programs = generator.randint(1, 4), generator.randint(1, 4)
    attend(lengths[:1] if across_heads else lengths, heads, generator.choice(HEAD_DIMS), programs, across_heads, seed)


def test_a_skipped_pair_is_waited_for():
    """A wait tells only odd phases from even ones: a consumer that missed a phase would take old data for new."""
    for seed in range(30):
        attend([300], 9, 64, 1, True, seed)
