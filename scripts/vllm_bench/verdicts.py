"""The bars that figures of `bench_vllm.py` are held to, and which figures reach them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_bench.cases import (
    ATTENTION,
    ATTENTION_BARS,
    ATTENTION_BEST,
    BEST,
    FRAMES,
    IMAGE_SIDES,
    MODES,
    OFF,
    PIXELS,
    PLUGIN,
    TOWER_ALLOWANCE,
    TTFT_BARS,
)

Result = dict[str, Any]
"""All figures of one model, as `--json` writes them."""
Row = dict[str, Any]
"""Figures of one case."""

TOWER_FIGURES = Path(__file__).resolve().parents[1] / "readme" / "towers.json"
"""The figures of `bench_e2e.py`."""


@dataclass(frozen=True)
class Verdict:
    """One ratio and its bar."""

    name: str
    value: float
    """NaN where there is no figure."""
    limit: float
    less_is_better: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.less_is_better else self.value >= self.limit

    def __str__(self) -> str:
        figure = "no figure" if math.isnan(self.value) else f"{self.value:.2f}×"
        return (
            f"{self.name}: {figure} ({'≤' if self.less_is_better else '≥'} {self.limit:.2f}) {'✓' if self.met else '✗'}"
        )


def wrong_modes(result: Result, row: Row) -> Mapping[str, list[str]]:
    """Return what is wrong with each mode's results in a row; no ratio is given for a mode that has any."""
    if "failures" in row:
        found: Mapping[str, list[str]] = row["failures"]
        return found
    compared = (result["agreement"] or {}).get("modes", {})
    return {name: compared[name]["failures"] if name in compared else ["not compared"] for name in row["times"]}


def speedup(result: Result, row: Row, ours: str, theirs: str) -> float:
    """Return how many times as long `theirs` takes as `ours`; NaN where one has no time or failed the comparison."""
    wrong = wrong_modes(result, row)
    if not {ours, theirs} <= row["times"].keys() or wrong.get(ours) or wrong.get(theirs):
        return math.nan
    return float(row["times"][theirs]["median"] / row["times"][ours]["median"])


def fastest_of_vllm(row: Row) -> str:
    """Return which of vLLM's own modes is the fastest: the best settings where none was measured."""
    own = [name for name in (BEST, OFF) if name in row["times"]]
    return min(own, key=lambda name: row["times"][name]["median"], default=BEST)


@cache
def measured_ratios(path: Path = TOWER_FIGURES) -> dict[tuple[str, str], float]:
    """Return the ratio of vLLM's best tower's time to qwenvit's that `bench_e2e.py` measured, by model and case."""
    found = {}
    for result in json.loads(path.read_text()):
        for row in result["rows"]:
            theirs = [time["median"] for name, time in row["times"].items() if name.startswith("vLLM")]
            if theirs:
                found[result["model"], row["name"]] = min(theirs) / row["times"]["qwenvit"]["median"]
    return found


def tower_bar(model: str, case: str) -> float:
    """Return the least ratio of vLLM's best tower's time to that of the plugin's."""
    return max(1.0, TOWER_ALLOWANCE * measured_ratios().get((model, case), 1.0))


def tower_verdicts(result: Result, row: Row) -> list[Verdict]:
    """Return the verdicts of a case of the tower alone, for the modes that were measured."""
    model, name, found = result["model"], row["name"], []
    if {PLUGIN, BEST} <= row["times"].keys():
        value = speedup(result, row, PLUGIN, fastest_of_vllm(row))
        found.append(Verdict(f"{name}, tower over vLLM's best", value, tower_bar(model, name)))
    sides = {f"{side}²" for side in IMAGE_SIDES}
    for ours, theirs in ((ATTENTION, OFF), (ATTENTION_BEST, BEST)):
        if {ours, theirs} <= row["times"].keys() and model in ATTENTION_BARS and name in sides:
            words = f"{name}, {MODES[ours].name} over {MODES[theirs].name}"
            found.append(Verdict(words, speedup(result, row, ours, theirs), 1.0))
    return found


def request_verdicts(result: Result, row: Row) -> list[Verdict]:
    """Return the verdicts of a case of whole requests, for the modes that were measured."""
    found = []
    for mode in (mode for mode in (PLUGIN, PIXELS) if {mode, BEST} <= row["times"].keys()):
        limit = TTFT_BARS.get(row["name"], 1.0) if mode == PIXELS else 1.0
        words = f"{row['name']}, first token, {MODES[mode].name} to vLLM's best"
        found.append(Verdict(words, 1 / speedup(result, row, mode, BEST), limit, less_is_better=True))
        if fastest_of_vllm(row) == OFF:
            found.append(Verdict(f"{row['name']}, first token, {MODES[mode].name} to vLLM",
                                 1 / speedup(result, row, mode, OFF), 1.0, less_is_better=True))  # fmt: skip
    return found


def crowd_verdicts(result: Result) -> list[Verdict]:
    """Return the verdicts of many requests at once."""
    row = result["crowd"]
    modes = [mode for mode in (PLUGIN, PIXELS) if row and {mode, BEST} <= row["times"].keys()]
    return [
        Verdict(f"{row['name']}, images/s, {MODES[mode].name} over vLLM's best",
                speedup(result, row, mode, fastest_of_vllm(row)), 1.0)
        for mode in modes
    ]  # fmt: skip


def verdicts(result: Result) -> list[Verdict]:
    """Return the verdict for every bar whose figures were measured; none for tiny models."""
    if result["tiny"]:
        return []
    found = [verdict for row in result["tower"] for verdict in tower_verdicts(result, row)]
    found += [verdict for row in result["requests"] for verdict in request_verdicts(result, row)]
    return found + crowd_verdicts(result)


def passed(result: Result) -> bool:
    """Return whether every step ran and every comparison passed."""
    rows = [*result["tower"], *result["requests"], *([result["crowd"]] if result["crowd"] else [])]
    return not result["failed"] and not any(why for row in rows for why in wrong_modes(result, row).values())


def frames_a_second(row: Row, mode: str) -> float:
    return float(FRAMES / row["times"][mode]["median"])
