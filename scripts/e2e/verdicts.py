"""What the figures of `bench_e2e.py` are held to, and which of them reach it."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from e2e.cases import BARS, COLD_BAR, EXACT_BAR
from peers.towers import SDPA, TIMM

Result = dict[str, Any]
"""All figures of one model, as JSON holds them."""
Row = dict[str, Any]
"""One case of them."""

OURS = "qwenvit"
NO_DEEPSTACK = "qwenvit without DeepStack"
APART = (OURS, NO_DEEPSTACK, TIMM)
"""Not rivals of the whole tower: ours, and the two that leave DeepStack out."""
LEFT_OUT = "(--"
"""In the reason why a contender did not run: what follows is the option by which somebody left it out."""
KINDS = {
    "ms": ("{:.3f} ms", True),
    "over sdpa": ("{:.2f}× transformers sdpa", False),
    "over the best": ("{:.2f}× the best rival", False),
    "frames/s": ("{:.0f} frames/s", False),
    "MiB": ("{:.0f} MiB above the weights", True),
    "exact": ("{:.2f}× a graph of its exact shape", True),
    "cold": ("{:.1f} s from load to first embedding", True),
}
"""What bars speak of: how it is written, and whether less is better."""


@dataclass(frozen=True)
class Verdict:
    """One figure beside its bar."""

    case: str
    kind: str
    value: float
    """NaN where there is none."""
    limit: float
    moonshot: float | None = None
    allowed: bool = True
    """Whether parity held."""

    @property
    def met(self) -> bool:
        return self.allowed and (self.value <= self.limit if KINDS[self.kind][1] else self.value >= self.limit)

    @property
    def text(self) -> str:
        """The figure and what is asked for."""
        text, at_most = KINDS[self.kind]
        figure = "no figure" if math.isnan(self.value) else text.format(self.value)
        return f"{figure} ({'≤' if at_most else '≥'} {self.limit:g})"

    def __str__(self) -> str:
        moonshot = f" (moonshot {self.moonshot:g})" if self.moonshot else ""
        return f"{self.text}{moonshot} {'✓' if self.met else '✗'}"


def best_rival(row: Row) -> str | None:
    """The fastest that does the whole tower's work; None where one was left out, which might have been faster."""
    if any(LEFT_OUT in why for name, why in row["missing"].items() if name not in APART):
        return None
    others = [name for name in row["times"] if name not in APART]
    return min(others, key=lambda name: row["times"][name]["median"], default=None)


def value_of(kind: str, row: Row) -> float:
    """A figure that bars speak of; NaN where it may not or cannot be said."""
    ours = row["times"][OURS]["median"]
    if kind == "ms":
        return ours * 1e3
    if kind == "frames/s":
        return row["frames"] / ours
    if kind == "MiB":
        return row["peak"][OURS] / 2**20
    rival = SDPA if kind == "over sdpa" else best_rival(row)
    return row["times"][rival]["median"] / ours if row["passed"] and rival in row["times"] else math.nan


def verdicts(model: str, row: Row) -> list[Verdict]:
    """Of one case."""
    return [
        Verdict(row["name"], bar.kind, value_of(bar.kind, row), bar.limit, bar.moonshot, row["passed"])
        for bar in BARS.get((model, row["name"]), ())
    ]


def ratios(sizes: list[Row]) -> list[float]:
    """Of random sizes over graphs of their exact shapes."""
    return [size["ours"] / size["exact"] for size in sizes]


def sizes_verdict(sizes: list[Row]) -> Verdict:
    """The worst of them."""
    found = ratios(sizes)
    worst = max(range(len(found)), key=found.__getitem__)
    return Verdict(f"{sizes[worst]['name']} patches", "exact", found[worst], EXACT_BAR)


def sizes_text(sizes: list[Row]) -> str:
    found = ratios(sizes)
    return (
        f"{len(found)} random sizes over graphs of their exact shapes: median {statistics.median(found):.2f}, "
        f"{min(found):.2f} to {max(found):.2f} (worst {sizes_verdict(sizes).case}; each ≤ {EXACT_BAR:g}) "
        f"{'✓' if sizes_verdict(sizes).met else '✗'}"
    )


def cold_verdict(cold: Row) -> Verdict:
    return Verdict("cold process", "cold", cold["load"] + cold["first"], COLD_BAR)


def judged(result: Result) -> list[Verdict]:
    """Every bar of a model."""
    found = [verdict for row in result["rows"] for verdict in verdicts(result["model"], row)]
    found += [sizes_verdict(result["sizes"])] if result["sizes"] else []
    return found + ([cold_verdict(result["cold"])] if result["cold"] else [])
