"""The order that puts a tower's patches in reading order, against the positions of the plan and transformers' order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvit.plan.grid_plan import GridPlan
from qwenvit.plan.reading_order import reading_order
from support.hidden_states import reading_order as transformers_order
from support.towers import SMALL

side = st.integers(1, 14).map(lambda n: 2 * n)
grids = st.lists(st.tuples(st.integers(1, 3), side, side).map(list), min_size=1, max_size=4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_patches_are_put_in_reading_order(family):
    @settings(max_examples=30, deadline=None)
    @given(grids)
    def check(batch):
        grid = torch.tensor(batch)
        order = reading_order(grid, SMALL[family])
        assert order.dtype == torch.int64
        assert order.tolist() == transformers_order(SMALL[family], batch)

    check()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_by_token_the_patches_of_each_token_are_neighbours(family):
    @settings(max_examples=30, deadline=None)
    @given(grids)
    def check(batch):
        order = reading_order(torch.tensor(batch), SMALL[family], by_token=True)
        assert sorted(order.tolist()) == list(range(len(order)))
        position_ids = GridPlan.build(batch, SMALL[family]).position_ids  # in the tower's order
        expected = [
            [2 * row + inner // 2, 2 * column + inner % 2]
            for frames, rows, columns in batch
            for _ in range(frames)
            for row in range(rows // 2)
            for column in range(columns // 2)
            for inner in range(4)
        ]
        assert position_ids[order].tolist() == expected

    check()
