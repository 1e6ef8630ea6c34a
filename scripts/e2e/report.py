"""Figures of `bench_e2e.py` as markdown, and as the README's block."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from e2e.graphs import LARGE, SMALL
from e2e.verdicts import (
    NO_DEEPSTACK,
    OURS,
    Result,
    Row,
    best_rival,
    cold_verdict,
    judged,
    sizes_text,
    value_of,
    verdicts,
)
from peers.towers import FLAGS, SDPA, TIMM

BEGIN, END = "<!-- bench_e2e.py: begin -->", "<!-- bench_e2e.py: end -->"
METHOD = (
    "Medians of wall time in ms from `encoder(pixel_values, grid)`, pixel values on the GPU in bf16 and the grid on "
    "the CPU, until the result is there; the contenders of a row take turns in one process (vLLM: in its own). p10–p90"
    " in brackets. The grids of a case are the same in every call, and ours keeps their table. Best rival: the fastest"
    " of those that do the whole tower's work, where none was left out. TFLOP/s counts matrix products. MiB is the "
    "peak of a call above one copy of the weights as the checkpoint has them: results, static buffers, the pool of "
    "this case's CUDA graph alone (beyond 32768 patches there is none), padding of weights and cuBLAS' workspaces "
    "included. No speedup is printed where the outputs are further from fp32 than 1.05 times transformers' own in bf16"
    " (3 times, where those are off by more than 5 %). Bars are what this project set out to reach, moonshots what it "
    "would like to."
)


def _ms(row: Row, name: str) -> str:
    return f"{row['times'][name]['median'] * 1e3:.2f}" if name in row["times"] else "–"


def _spread(row: Row, name: str) -> str:
    times = row["times"].get(name, {})
    return f" ({times['p10'] * 1e3:.2f}–{times['p90'] * 1e3:.2f})" if "p10" in times else ""


def _ours(row: Row) -> str:
    frames = f", {value_of('frames/s', row):.0f} frames/s" if row["frames"] else ""
    return f"**{_ms(row, OURS)}**{_spread(row, OURS)}{frames}"


def _ratio(kind: str, row: Row) -> str:
    ratio = value_of(kind, row)
    return "–" if math.isnan(ratio) else f"{ratio:.2f}×"


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def short_table(result: Result) -> str:
    """A row a case: ours, the best rival, and what transformers runs by default."""
    head = ["", "patches", "qwenvit, ms", "best rival, ms", "over it", "transformers sdpa, ms", "over it"]
    lines = []
    for row in result["rows"]:
        best = best_rival(row)
        theirs = f"{_ms(row, best)}{_spread(row, best)}, {best}" if best else "–"
        cells = [row["name"], str(row["patches"]), _ours(row), theirs, _ratio("over the best", row)]
        lines.append([*cells, _ms(row, SDPA) + _spread(row, SDPA), _ratio("over sdpa", row)])
    return _table(head, lines)


def full_table(result: Result) -> str:
    """A row a case; a column for each contender that ran on any, in ms."""
    rivals = list(dict.fromkeys(name for row in result["rows"] for name in row["times"] if name != OURS))
    head = ["", OURS, "TFLOP/s", "of the GEMM ceiling", "MiB (transformers)", *rivals, "bars"]
    lines = []
    for row in result["rows"]:
        rate = row["flops"] / row["times"][OURS]["median"]
        memory = f"{row['peak'][OURS] / 2**20:.0f} ({row['peak'][SDPA] / 2**20:.0f})"
        cells = [row["name"], _ms(row, OURS), f"{rate / 1e12:.0f}", f"{rate / result['gemm']:.0%}", memory]
        bars = ", ".join(map(str, verdicts(result["model"], row)))
        cells += [_ms(row, name) for name in rivals]
        lines.append([*cells, bars if row["passed"] else f"parity failed: {row['failure']}"])
    return _table(head, lines)


def missing(result: Result) -> list[str]:
    """Rivals that did not run, with the reason and the cases."""
    found = sorted((name, why, row["name"]) for row in result["rows"] for name, why in row["missing"].items())
    lines = []
    for (name, why), group in itertools.groupby(found, key=lambda entry: entry[:2]):
        cases = [case for *_, case in group]
        lines.append(f"{name}: {why} ({'all' if len(cases) == len(result['rows']) else ', '.join(cases)})")
    return lines


def failures(result: Result) -> list[str]:
    """What failed, by the reason: once a CUDA error has happened, all that follows fails alike."""
    groups: dict[str, list[str]] = {}
    for part, why in result["failed"]:
        groups.setdefault(why, []).append(part)
    return [f"{', '.join(parts)}: {why}" for why, parts in groups.items()]


def over_timm(result: Result) -> list[str]:
    """How much faster our tower without DeepStack is, by case."""
    rows = [row for row in result["rows"] if row["passed"] and {TIMM, NO_DEEPSTACK} <= row["times"].keys()]
    ratios = [row["times"][TIMM]["median"] / row["times"][NO_DEEPSTACK]["median"] for row in rows]
    return [f"{ratio:.2f}× ({row['name']})" for ratio, row in zip(ratios, rows, strict=True)]


def cold_text(cold: Row) -> str:
    return (
        f"Cold process, nothing compiled: {cold_verdict(cold)}: loading {cold['load']:.1f} s, the first 448² image "
        f"{cold['first']:.1f} s with {cold['kernels']} kernels compiled. Nothing is subtracted: the file's "
        f"{cold['bytes'] / 2**30:.2f} GiB lay in the system's cache, and reading them alone took {cold['read']:.1f} s. "
        f"Imports, before that: {cold['imports']:.1f} s; the second image: {cold['second'] * 1e3:.1f} ms"
    )


def graphs_text(costs: Row) -> str:
    mebibytes = {name: count / 2**20 for name, count in costs["memory"].items()}
    host = costs["host"]
    waits = "never waiting for the GPU" if not host["waited"] else f"having waited for the GPU {host['waited']} times"
    return (
        f"CUDA graphs: a capture takes {costs['capture'][LARGE]:.0f} ms at {LARGE}, then {costs['capture'][SMALL]:.0f} "
        f"ms at {SMALL}; the first keeps {mebibytes[LARGE]:.0f} MiB, the second adds {mebibytes[SMALL]:.0f} MiB. "
        f"`warmup` for one image of any size up to {LARGE}: {costs['graphs']} graphs in {costs['seconds']:.1f} s, "
        f"{costs['held'] / 2**20:.0f} MiB, and {costs['driver'] / 2**20:.0f} MiB of the driver's own. A call at "
        f"{SMALL} returns after {host['us']:.0f} µs, {waits}"
    )


def notes(result: Result) -> list[str]:
    """What stands below a model's table."""
    bars = judged(result)
    groups = itertools.groupby((bar for bar in bars if not bar.met), key=lambda bar: bar.case)
    missed = "; ".join(f"{case}: {', '.join(bar.text for bar in group)}" for case, group in groups)
    found = [f"{sum(bar.met for bar in bars)} of {len(bars)} bars met"] if bars else []
    found += [f"Not met: {missed}"] if missed else []
    found += [f"Parity: {result['gate']}"] if result["gate"] else []
    found += [sizes_text(result["sizes"])] if result["sizes"] else []
    found += [cold_text(result["cold"])] if result["cold"] else []
    found += [graphs_text(result["graphs"])] if result["graphs"] else []
    found += [f"{NO_DEEPSTACK} over timm: {', '.join(over_timm(result))}"] if over_timm(result) else []
    found += [f"Not measured: {line}" for line in missing(result)]
    return found + [f"Failed: {line}" for line in failures(result)]


def section(result: Result) -> str:
    """One model: a short table, what is to be said about it, and all figures to fold out."""
    lines = "\n".join(f"- {note}." for note in notes(result))
    head = f"#### {result['model']}\n\n"
    if not result["rows"]:
        return head + lines
    details = f"<details><summary>All contenders, TFLOP/s, memory, bars</summary>\n\n{result['ceilings']}\n\n"
    return f"{head}{short_table(result)}\n\n{lines}\n\n{details}{full_table(result)}\n\n</details>"


def profile_tables(result: Result, most: int = 12) -> str:
    """Where the time of one forward pass goes."""
    parts = []
    for case, profile in result["profiles"].items():
        span, busy = profile["span"], sum(kernel["us"] for kernel in profile["kernels"])
        parts.append(
            f"\n{result['model']}, {case}: kernels and copies of {busy:.0f} µs in a span of {span:.0f} µs under the "
            f"profiler, whose own work widens the gaps; the graph's replay alone, by CUDA events and without the "
            f"profiler, takes {profile['replay']:.0f} µs\n"
        )
        names = ((kernel, kernel["name"][:80].replace("|", "\\|")) for kernel in profile["kernels"][:most])
        lines = [[f"`{name}`", str(k["calls"]), f"{k['us']:.0f}", f"{k['us'] / busy:.0%}"] for k, name in names]
        parts.append(_table(["kernel", "calls", "µs", "of all"], lines))
    return "\n".join(parts)


def block(results: Iterable[Result]) -> str:
    """All models, under the machines they ran on."""
    parts = []
    for machine, group in itertools.groupby(results, key=lambda result: result["machine"]):
        parts += [machine, *(section(result) for result in group)]
    return "\n\n".join([*parts, METHOD, FLAGS])


def rewrite(readme: Path, text: str) -> None:
    """Put a text between the two markers of a README.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    old = readme.read_text()
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        raise ValueError(f"--readme: expected one {BEGIN} and then one {END} in {readme}")
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
