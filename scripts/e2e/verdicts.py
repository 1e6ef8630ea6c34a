"""The bars that figures of `bench_e2e.py` are held to, and which figures reach them."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from e2e.cases import BARS, COLD_START_BAR, EXACT_GRAPH_BAR
from peers.rivals import SDPA, TIMM

Result = dict[str, Any]
"""All figures of one model, as `--json` writes them."""
Row = dict[str, Any]
"""Figures of one case."""

OURS = "qwenvit"
NO_DEEPSTACK = "qwenvit without DeepStack"
NOT_RIVALS = (OURS, NO_DEEPSTACK, TIMM)
"""qwenvit itself, and two towers without DeepStack: not rivals for the whole tower's work."""
OMITTED_BY_OPTION = "(--"
"""A reason with this text, such as `not given (--fa3)`, names the option that kept a contender from running."""
KINDS = {
    "ms": ("{:.3f} ms", True),
    "over sdpa": ("{:.2f}× transformers sdpa", False),
    "over best rival": ("{:.2f}× the best rival", False),
    "frames/s": ("{:.0f} frames/s", False),
    "MiB": ("{:.0f} MiB above the weights", True),
    "exact": ("{:.2f}× a graph of its exact shape", True),
    "cold": ("{:.1f} s from load to first embedding", True),
}
"""Kinds of figures with bars: the format, and whether less is better."""


@dataclass(frozen=True)
class Verdict:
    """One figure and its bar."""

    case: str
    kind: str
    value: float
    """NaN where there is no figure."""
    limit: float
    moonshot: float | None = None
    parity_passed: bool = True

    @property
    def met(self) -> bool:
        return self.parity_passed and (self.value <= self.limit if KINDS[self.kind][1] else self.value >= self.limit)

    @property
    def figure(self) -> str:
        return "no figure" if math.isnan(self.value) else KINDS[self.kind][0].format(self.value)

    @property
    def text(self) -> str:
        """The figure and its limit."""
        return f"{self.figure} ({'≤' if KINDS[self.kind][1] else '≥'} {self.limit:g})"

    def __str__(self) -> str:
        moonshot = f" (moonshot {self.moonshot:g})" if self.moonshot else ""
        return f"{self.text}{moonshot} {'✓' if self.met else '✗'}"


def best_rival(row: Row) -> str | None:
    """Return the fastest rival that does the whole tower's work.

    None where an option omitted a rival, which might have been faster.
    """
    if any(OMITTED_BY_OPTION in why for name, why in row["missing"].items() if name not in NOT_RIVALS):
        return None
    rivals = [name for name in row["times"] if name not in NOT_RIVALS]
    return min(rivals, key=lambda name: row["times"][name]["median"], default=None)


def value_of(kind: str, row: Row) -> float:
    """Return a row's figure of a kind; NaN for a speedup without its rival or where parity failed."""
    ours = row["times"][OURS]["median"]
    if kind == "ms":
        return ours * 1e3
    if kind == "frames/s":
        return row["frames"] / ours
    if kind == "MiB":
        return row["peak"][OURS] / 2**20
    rival = SDPA if kind == "over sdpa" else best_rival(row)
    return row["times"][rival]["median"] / ours if row["passed"] and rival in row["times"] else math.nan


def row_verdicts(model: str, row: Row) -> list[Verdict]:
    """Return the verdict for every bar of a case."""
    return [
        Verdict(row["name"], bar.kind, value_of(bar.kind, row), bar.limit, bar.moonshot, row["passed"])
        for bar in BARS.get((model, row["name"]), ())
    ]


def exact_graph_ratios(sizes: list[Row]) -> list[float]:
    """Return the time of each random size over the time of a graph of its exact shape."""
    return [size["ours"] / size["exact"] for size in sizes]


def sizes_verdict(sizes: list[Row]) -> Verdict:
    """Return the verdict for the worst of the random sizes."""
    ratios = exact_graph_ratios(sizes)
    worst = max(range(len(ratios)), key=ratios.__getitem__)
    return Verdict(f"{sizes[worst]['name']} patches", "exact", ratios[worst], EXACT_GRAPH_BAR)


def sizes_text(sizes: list[Row], with_bar: bool) -> str:
    ratios, verdict = exact_graph_ratios(sizes), sizes_verdict(sizes)
    bar, mark = (f"; each ≤ {EXACT_GRAPH_BAR:g}", f" {'✓' if verdict.met else '✗'}") if with_bar else ("", "")
    return (
        f"{len(ratios)} random sizes over graphs of their exact shapes: median {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f} (worst {verdict.case}{bar}){mark}"
    )


def cold_verdict(cold: Row) -> Verdict:
    return Verdict("cold process", "cold", cold["load"] + cold["first"], COLD_START_BAR)


def all_verdicts(result: Result) -> list[Verdict]:
    """Return the verdict for every bar of a model."""
    found = [verdict for row in result["rows"] for verdict in row_verdicts(result["model"], row)]
    found += [sizes_verdict(result["sizes"])] if result["sizes"] else []
    return found + ([cold_verdict(result["cold"])] if result["cold"] else [])
