"""Which capacity to run a batch at: a graph of its own, or one that other sizes share.

A capture takes as long as several passes, and many sizes never come again. So a new capacity is captured in coarse
steps, or runs in a larger graph that is there; it gets a graph of its own when it comes twice in a row, or often.
"""

from collections.abc import Iterable
from operator import le

from qwenvit.graphs.capacity import Capacity, coarse_capacity

OCCURRENCES_BEFORE_CAPTURE = 16
"""A capacity that occurred this often gets a graph of its own: its padding has then cost about half a capture."""
MAX_COUNTED_CAPACITIES = 4096
"""Beyond this many, it is forgotten how often capacities occurred."""


class GraphSharing:
    """Counts the capacities of batches of the same work, and decides at which capacity each runs.

    Args:
        merge_unit: patches of a merged token.
    """

    def __init__(self, merge_unit: int) -> None:
        self._merge_unit = merge_unit
        self._occurrences = dict[Capacity, int]()
        self._last: Capacity | None = None

    def choose(self, capacity: Capacity, has_own_graph: bool, captured: Iterable[Capacity]) -> Capacity:
        """Return the capacity of the graph to run a batch in; it may not be captured yet.

        Args:
            capacity: of the smallest graph for the batch.
            has_own_graph: whether that is captured.
            captured: the capacities of all graphs of the same work; read only where a batch has no graph of its own.
        """
        comes_again, self._last = capacity == self._last, capacity
        if has_own_graph:
            return capacity
        if len(self._occurrences) >= MAX_COUNTED_CAPACITIES:
            self._occurrences.clear()
        self._occurrences[capacity] = occurrences = self._occurrences.get(capacity, 0) + 1
        graphs = list(captured)
        if comes_again or occurrences >= OCCURRENCES_BEFORE_CAPTURE or not graphs:
            return capacity
        coarse = coarse_capacity(capacity, self._merge_unit)
        fits = [graph for graph in graphs if all(map(le, capacity, graph)) and all(map(le, graph, coarse))]
        return min(fits, default=coarse)
