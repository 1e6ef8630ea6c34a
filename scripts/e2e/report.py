"""Figures of `bench_e2e.py` as markdown, for the terminal and for a page."""

import itertools
import math
from collections.abc import Iterable

from common.pages import table
from common.steps import failures
from e2e.graphs import LARGE, SMALL
from e2e.verdicts import (
    NO_DEEPSTACK,
    OURS,
    Result,
    Row,
    all_verdicts,
    best_rival,
    cold_verdict,
    row_verdicts,
    sizes_text,
    value_of,
)
from peers.rivals import SDPA, TIMM

TOWERS_MARKERS = ("<!-- bench_e2e.py: begin -->", "<!-- bench_e2e.py: end -->")
"""Around all figures of whole towers, in BENCHMARKS.md."""
SPEED_MARKERS = ("<!-- speed: begin -->", "<!-- speed: end -->")
"""Around the short table of speedups, in the README."""
BARS_METHOD = "Bars are what this project set out to reach, moonshots what it would like to."
SPEED_ROWS = tuple((model, f"{side}²") for model in ("Qwen2.5-VL-7B", "Qwen3-VL-8B") for side in (448, 896, 1344))
"""Model and case of each row of the README's table."""


def _ms(row: Row, name: str) -> str:
    return f"{row['times'][name]['median'] * 1e3:.2f}" if name in row["times"] else "–"


def _spread(row: Row, name: str) -> str:
    times = row["times"].get(name, {})
    in_a_row = ", in a row" if times.get("in_a_row") else ""
    return f" ({times['p10'] * 1e3:.2f}–{times['p90'] * 1e3:.2f}{in_a_row})" if "p10" in times else ""


def _ours(row: Row) -> str:
    frames = f", {value_of('frames/s', row):.0f} frames/s" if row["frames"] else ""
    return f"**{_ms(row, OURS)}**{_spread(row, OURS)}{frames}"


def _speedup(kind: str, row: Row) -> str:
    ratio = value_of(kind, row)
    return "–" if math.isnan(ratio) else f"{ratio:.2f}×"


def short_table(result: Result) -> str:
    """Return a row for each case: qwenvit, the best rival, and transformers with its default attention."""
    head = ["", "patches", "qwenvit, ms", "best rival, ms", "speedup", "transformers sdpa, ms", "speedup"]
    lines = []
    for row in result["rows"]:
        best = best_rival(row)
        theirs = f"{_ms(row, best)}{_spread(row, best)}, {best}" if best else "–"
        cells = [row["name"], str(row["patches"]), _ours(row), theirs, _speedup("over best rival", row)]
        lines.append([*cells, _ms(row, SDPA) + _spread(row, SDPA), _speedup("over sdpa", row)])
    return table(head, lines)


def full_table(result: Result, for_readers: bool) -> str:
    """Return a row for each case and a column in ms for each contender that ran in any; bars unless `for_readers`."""
    rivals = list(dict.fromkeys(name for row in result["rows"] for name in row["times"] if name != OURS))
    head = ["", OURS, "TFLOP/s", "of the GEMM ceiling", "MiB (transformers)", *rivals]
    lines = []
    for row in result["rows"]:
        rate = row["flops"] / row["times"][OURS]["median"]
        memory = f"{row['peak'][OURS] / 2**20:.0f} ({row['peak'][SDPA] / 2**20:.0f})"
        cells = [row["name"], _ms(row, OURS), f"{rate / 1e12:.0f}", f"{rate / result['gemm']:.0%}", memory]
        cells += [_ms(row, name) for name in rivals]
        if not for_readers:
            bars = ", ".join(map(str, row_verdicts(result["model"], row)))
            cells.append(bars if row["passed"] else f"parity failed: {row['failure']}")
        lines.append(cells)
    return table(head if for_readers else [*head, "bars"], lines)


def missing(result: Result) -> list[str]:
    """Return a line for each rival that did not run and each reason, with the cases."""
    found = sorted((name, why, row["name"]) for row in result["rows"] for name, why in row["missing"].items())
    lines = []
    for (name, why), group in itertools.groupby(found, key=lambda entry: entry[:2]):
        cases = [case for *_, case in group]
        lines.append(f"{name}: {why} ({'all' if len(cases) == len(result['rows']) else ', '.join(cases)})")
    return lines


def parity_failures(result: Result) -> list[str]:
    return [f"{row['name']}: {row['failure']}" for row in result["rows"] if not row["passed"]]


def speedups_over_timm(result: Result) -> list[str]:
    """Return timm's time over that of qwenvit without DeepStack, by case."""
    rows = [row for row in result["rows"] if row["passed"] and {TIMM, NO_DEEPSTACK} <= row["times"].keys()]
    ratios = [row["times"][TIMM]["median"] / row["times"][NO_DEEPSTACK]["median"] for row in rows]
    return [f"{ratio:.2f}× ({row['name']})" for ratio, row in zip(ratios, rows, strict=True)]


def cold_text(cold: Row, with_bar: bool) -> str:
    verdict = cold_verdict(cold)
    return (
        f"Cold process, nothing compiled: {verdict if with_bar else verdict.figure}: loading {cold['load']:.1f} s, the "
        f"first 448² image {cold['first']:.1f} s with {cold['kernels']} kernels compiled. Nothing is subtracted: the "
        f"file's {cold['bytes'] / 2**30:.2f} GiB were in the system's cache, and reading them alone took "
        f"{cold['read']:.1f} s. Imports, before that: {cold['imports']:.1f} s; the second image: "
        f"{cold['second'] * 1e3:.1f} ms"
    )


def graphs_text(costs: Row) -> str:
    mebibytes = {name: count / 2**20 for name, count in costs["memory"].items()}
    host = costs["host"]
    launch = ""
    if "launch" in host:
        launch = f"launches its graph after {host['launch']:.0f} µs ({host['cold_launch']:.0f} on a cold host) and "
    waits = f"having waited for the GPU {host['waited']} times" if host["waited"] else "without waiting for the GPU"
    return (
        f"CUDA graphs: a capture takes {costs['capture'][LARGE]:.0f} ms at {LARGE}, then {costs['capture'][SMALL]:.0f} "
        f"ms at {SMALL}; the first takes {mebibytes[LARGE]:.0f} MiB, the second adds {mebibytes[SMALL]:.0f} MiB. "
        f"`warmup` for one image of any size up to {LARGE}: {costs['graphs']} graphs in {costs['seconds']:.1f} s, "
        f"{costs['held'] / 2**20:.0f} MiB, and {costs['driver'] / 2**20:.0f} MiB of the driver's own. A call at "
        f"{SMALL} {launch}returns after {host['us']:.0f} µs, {waits}"
    )


def notes(result: Result, for_readers: bool) -> list[str]:
    """Return the lines below a model's table.

    Args:
        result: the model's figures.
        for_readers: leave out the bars, and the rivals that did not run.
    """
    found = [] if for_readers else bar_notes(result)
    found += [f"Parity: {result['gate']}"] if result["gate"] else []
    found += [f"Parity failed: {line}" for line in parity_failures(result)] if for_readers else []
    found += [sizes_text(result["sizes"], not for_readers)] if result["sizes"] else []
    found += [cold_text(result["cold"], not for_readers)] if result["cold"] else []
    found += [graphs_text(result["graphs"])] if result["graphs"] else []
    over_timm = speedups_over_timm(result)
    found += [f"{NO_DEEPSTACK} over timm: {', '.join(over_timm)}"] if over_timm else []
    found += [] if for_readers else [f"Not measured: {line}" for line in missing(result)]
    return found + [f"Failed: {line}" for line in failures(result)]


def bar_notes(result: Result) -> list[str]:
    """Return how many bars are met, and the figures that miss theirs."""
    bars = all_verdicts(result)
    groups = itertools.groupby((bar for bar in bars if not bar.met), key=lambda bar: bar.case)
    missed = "; ".join(f"{case}: {', '.join(bar.text for bar in group)}" for case, group in groups)
    found = [f"{sum(bar.met for bar in bars)} of {len(bars)} bars met"] if bars else []
    return found + ([f"Not met: {missed}"] if missed else [])


def section(result: Result, for_readers: bool) -> str:
    """Return one model's short table and notes, and all its figures folded up."""
    lines = "\n".join(f"- {note}." for note in notes(result, for_readers))
    head = f"### {result['model']}\n\n"
    if not result["rows"]:
        return head + lines
    summary = f"All contenders, TFLOP/s, memory{'' if for_readers else ', bars'}"
    details = f"<details><summary>{summary}</summary>\n\n{result['ceilings']}\n\n"
    return f"{head}{short_table(result)}\n\n{lines}\n\n{details}{full_table(result, for_readers)}\n\n</details>"


def profile_tables(result: Result, max_kernels: int = 12) -> str:
    """Return a table of kernels for each profiled case, the slowest first."""
    parts = []
    for case, profile in result["profiles"].items():
        span, busy = profile["span"], sum(kernel["us"] for kernel in profile["kernels"])
        parts.append(
            f"\n{result['model']}, {case}: kernels and copies of {busy:.0f} µs in a span of {span:.0f} µs under the "
            f"profiler, which widens the gaps between kernels; the graph's replay alone, by CUDA events and without "
            f"the profiler, takes {profile['replay']:.0f} µs\n"
        )
        names = ((kernel, kernel["name"][:80].replace("|", "\\|")) for kernel in profile["kernels"][:max_kernels])
        lines = [[f"`{name}`", str(k["calls"]), f"{k['us']:.0f}", f"{k['us'] / busy:.0%}"] for k, name in names]
        parts.append(table(["kernel", "calls", "µs", "of all"], lines))
    return "\n".join(parts)


def block(results: Iterable[Result], for_readers: bool) -> str:
    """Return the sections of all models, under the machines they ran on, and over how they were measured.

    Args:
        results: figures by model.
        for_readers: leave out the project's own bars and moonshots, and the rivals that did not run.
    """
    parts = []
    for method, measured_alike in itertools.groupby(results, key=lambda result: result["method"]):
        for machine, group in itertools.groupby(measured_alike, key=lambda result: result["machine"]):
            parts += [machine, *(section(result, for_readers) for result in group)]
        parts.append(method)
    return "\n\n".join(parts if for_readers else [*parts, BARS_METHOD])


def speed_table(results: Iterable[Result]) -> str:
    """Return the README's table: qwenvit, the best rival and transformers sdpa on six inputs.

    Raises:
        ValueError: the results lack one of the inputs.
    """
    rows = {(result["model"], row["name"]): row for result in results for row in result["rows"]}
    if absent := [f"{model} at {case}" for model, case in SPEED_ROWS if (model, case) not in rows]:
        raise ValueError(f"--readme: expected figures of {len(SPEED_ROWS)} inputs, got none of {', '.join(absent)}")
    faster = "times faster"
    head = ["model, input", "qwenvit, ms", "best rival, ms", faster, "transformers sdpa, ms", faster]
    lines = []
    for model, case in SPEED_ROWS:
        row = rows[model, case]
        best = best_rival(row)
        cells = [f"{model}, {case}", f"**{_ms(row, OURS)}**", f"{_ms(row, best)} ({best})" if best else "–"]
        lines.append([*cells, _speedup("over best rival", row), _ms(row, SDPA), _speedup("over sdpa", row)])
    return table(head, lines)
