"""Capacities of graphs, and of the one that sizes the pool: what is needed, and little more."""

from hypothesis import given
from hypothesis import strategies as st

from qwenvit.graphs.capacity import MIN_GRAPH_PATCHES, Capacity, capacity_for, coarse_capacity, pool_patches_for
from qwenvit.kernels.gemm.cublas import MIN_ROWS


@given(st.integers(1, 2**15), st.integers(1, 900), st.integers(0, 9000), st.integers(1, 900), st.integers(1, 3000))
def test_a_capacity_covers_what_is_needed_and_little_more(tokens, frames, windows, items, side):
    need = Capacity(4 * tokens, frames, windows, items, side)
    capacity = capacity_for(need, 4)
    for name in ("patches", "frames", "windows", "items", "side"):
        assert getattr(capacity, name) >= getattr(need, name)
    assert capacity.patches % 4 == 0
    assert capacity.patches == MIN_GRAPH_PATCHES or capacity.patches - need.patches < max(16, need.patches / 32)
    assert capacity.patches >= MIN_ROWS  # or every product in the graph would copy its input to pad it
    rounded = need._replace(patches=capacity.patches, frames=capacity.frames, items=capacity.items)
    assert capacity_for(rounded, 4) == capacity
    assert capacity.windows <= max(2 * windows, capacity.patches // 48 + 16)


@given(st.integers(1, 2**13), st.integers(0, 900), st.integers(1, 3000))
def test_one_frame_stays_one(tokens, windows, side):
    """Attention splits one segment best when it knows that there is only one; a coarse graph too has one."""
    one = capacity_for(Capacity(4 * tokens, 1, windows, 1, side), 4)
    assert (one.frames, one.items) == (1, 1)
    coarse = coarse_capacity(one, 4)
    assert (coarse.frames, coarse.items) == (1, 1)
    video = capacity_for(Capacity(4 * tokens, 2, windows, 1, side), 4)
    assert video.frames > 1
    assert video.items == 1


@given(st.integers(1, 2**15))
def test_the_graph_that_sizes_the_pool_is_little_larger_than_needed(patches):
    assert patches <= pool_patches_for(patches) <= max(4096, patches * 9 / 8)
