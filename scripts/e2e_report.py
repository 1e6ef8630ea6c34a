"""Figures of `bench_e2e.py` as markdown, as a chart, and as the README's block."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from e2e_cases import BARS, EXACT_BAR
from e2e_rivals import FLAGS, SDPA, TIMM

Result = dict[str, Any]
"""All figures of one model, as JSON holds them."""
Row = dict[str, Any]
"""One case of them."""

OURS = "qwenvit"
NO_DEEPSTACK = "qwenvit without DeepStack"
APART = (OURS, NO_DEEPSTACK, TIMM)
"""Not rivals of the whole tower: ours, and the two that leave DeepStack out."""
KINDS = {
    "ms": ("{:.2f} ms", True),
    "over sdpa": ("{:.2f}× sdpa", False),
    "over the best": ("{:.2f}× the best", False),
    "frames/s": ("{:.0f} frames/s", False),
    "MiB": ("{:.0f} MiB", True),
}
"""What bars speak of: how it is written, and whether less is better."""
BEGIN, END = "<!-- bench_e2e.py: begin -->", "<!-- bench_e2e.py: end -->"
METHOD = (
    "Medians of wall time in ms from `encoder(pixel_values, grid)`, pixel values on the GPU in bf16 and the grid on "
    "the CPU, until the result is there; the contenders of a row take turns in one process (vLLM: in its own). "
    "p10–p90 in brackets. TFLOP/s counts matrix products. MiB is the peak above one copy of the weights, outputs, "
    "static buffers and graph pools included. No speedup is printed where the outputs are further from fp32 than 1.05 "
    "times transformers' own in bf16."
)


def value_of(kind: str, row: Row) -> float:
    """A figure that bars speak of; NaN where it may not or cannot be said."""
    ours = row["times"][OURS]["median"]
    if kind == "ms":
        return ours * 1e3
    if kind == "frames/s":
        return row["frames"] / ours
    if kind == "MiB":
        return row["peak"][OURS] / 2**20
    others = {name: time["median"] for name, time in row["times"].items() if name not in APART}
    if kind == "over sdpa":
        others = {name: seconds for name, seconds in others.items() if name == SDPA}
    return min(others.values()) / ours if others and row["passed"] else math.nan


def verdicts(model: str, row: Row) -> list[tuple[str, bool]]:
    """Each bar in words, and whether it is met."""
    found = []
    for bar in BARS.get((model, row["name"]), ()):
        text, at_most = KINDS[bar.kind]
        value = value_of(bar.kind, row)
        met = row["passed"] and (value <= bar.limit if at_most else value >= bar.limit)
        moonshot = f"; moonshot {bar.moonshot:g}" if bar.moonshot else ""
        figure = "no figure" if math.isnan(value) else text.format(value)
        found.append((f"{figure} ({'≤' if at_most else '≥'} {bar.limit:g}{moonshot}) {'✓' if met else '✗'}", met))
    return found


def sizes_verdict(sizes: list[Row]) -> tuple[str, bool]:
    ratios = [size["ours"] / size["exact"] for size in sizes]
    met = max(ratios) <= EXACT_BAR
    worst = sizes[ratios.index(max(ratios))]["name"]
    text = f"{len(sizes)} random sizes over graphs of their exact shapes: {min(ratios):.2f} to {max(ratios):.2f}"
    return f"{text} (worst {worst} patches; each ≤ {EXACT_BAR:g}) {'✓' if met else '✗'}", met


def judged(result: Result) -> list[bool]:
    """Whether each bar is met, the random sizes' own among them."""
    met = [met for row in result["rows"] for _, met in verdicts(result["model"], row)]
    return met + ([sizes_verdict(result["sizes"])[1]] if result["sizes"] else [])


def table(result: Result) -> str:
    """A row a case; a column for each contender that ran on any."""
    rows = result["rows"]
    rivals = list(dict.fromkeys(name for row in rows for name in row["times"] if name != OURS))
    head = ["", "patches", OURS, "TFLOP/s", "of the GEMM ceiling", "MiB (transformers)", *rivals]
    head += ["over sdpa", "over the best", "bars"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        ours = row["times"][OURS]
        rate = row["flops"] / ours["median"]
        frames = f", {row['frames'] / ours['median']:.0f} frames/s" if row["frames"] else ""
        ms = f"**{ours['median'] * 1e3:.2f}** ({ours['p10'] * 1e3:.2f}–{ours['p90'] * 1e3:.2f}){frames}"
        theirs = f" ({row['peak'][SDPA] / 2**20:.0f})" if SDPA in row["peak"] else ""
        cells = [row["name"], str(row["patches"]), ms, f"{rate / 1e12:.0f}", f"{rate / result['gemm']:.0%}"]
        cells.append(f"{row['peak'][OURS] / 2**20:.0f}{theirs}")
        cells += [f"{row['times'][name]['median'] * 1e3:.2f}" if name in row["times"] else "–" for name in rivals]
        for kind in ("over sdpa", "over the best"):
            ratio = value_of(kind, row)
            cells.append("–" if math.isnan(ratio) else f"{ratio:.2f}×")
        bars = ", ".join(text for text, _ in verdicts(result["model"], row))
        lines.append(f"| {' | '.join([*cells, bars if row['passed'] else 'parity failed: ' + row['failure']])} |")
    return "\n".join(lines)


def missing(result: Result) -> list[str]:
    """Rivals that did not run, with the cases and the reason."""
    found = sorted((name, why, row["name"]) for row in result["rows"] for name, why in row["missing"].items())
    return [
        f"{name}: {why} ({', '.join(case for *_, case in group)})"
        for (name, why), group in itertools.groupby(found, key=lambda entry: entry[:2])
    ]


def over_timm(result: Result) -> list[str]:
    """How much faster our tower without DeepStack is, by case."""
    rows = [row for row in result["rows"] if row["passed"] and {TIMM, NO_DEEPSTACK} <= row["times"].keys()]
    ratios = [row["times"][TIMM]["median"] / row["times"][NO_DEEPSTACK]["median"] for row in rows]
    return [f"{ratio:.2f}× ({row['name']})" for row, ratio in zip(rows, ratios, strict=True)]


def section(result: Result) -> str:
    """One model: table, random sizes, parity, and what did not run."""
    notes = [f"Parity: {result['gate']}."]
    if result["sizes"]:
        notes.append(f"{sizes_verdict(result['sizes'])[0]}.")
    notes.append(f"Load to first embedding, file read, caches of compiled kernels as found: {result['load']:.1f} s.")
    if ratios := over_timm(result):
        notes.append(f"{NO_DEEPSTACK} over timm: {', '.join(ratios)}.")
    notes += [f"Not measured: {line}." for line in missing(result)]
    notes += [f"Failed: {line}." for line in result["failed"]]
    return f"#### {result['model']}\n\n{table(result)}\n\n" + "\n".join(f"- {note}" for note in notes)


def profile_tables(result: Result, most: int = 12) -> str:
    """Where the time of one forward pass goes."""
    parts = []
    for case, profile in result["profiles"].items():
        span, busy = profile["span"], sum(kernel["us"] for kernel in profile["kernels"])
        head = f"{result['model']}, {case}: {span:.0f} µs on the GPU, of which {span - busy:.0f} between kernels"
        lines = [f"\n{head}\n", "| kernel | calls | µs | of all |", "|---|---|---|---|"]
        for kernel in profile["kernels"][:most]:
            name = kernel["name"][:80].replace("|", "\\|")
            lines.append(f"| `{name}` | {kernel['calls']} | {kernel['us']:.0f} | {kernel['us'] / span:.0%} |")
        parts.append("\n".join(lines))
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


def draw(results: list[Result], path: Path) -> None:
    """A panel a model: ms of each contender, by case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(12, 3.2 * len(results)), squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        names = list(dict.fromkeys(name for row in result["rows"] for name in row["times"]))
        colours = itertools.cycle(plt.get_cmap("tab20").colors)
        width = 0.85 / len(names)
        for which, (name, colour) in enumerate(zip(names, colours, strict=False)):
            bars = [
                (i, row["times"][name]["median"] * 1e3) for i, row in enumerate(result["rows"]) if name in row["times"]
            ]
            places = [i - 0.425 + width * (which + 0.5) for i, _ in bars]
            axis.bar(places, [ms for _, ms in bars], width * 0.94, color=colour, label=name)
        axis.set_xticks(range(len(result["rows"])), [row["name"] for row in result["rows"]], fontsize=8)
        axis.set_yscale("log")
        axis.set_ylabel("ms")
        axis.set_title(result["model"], loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Vision towers, whole forward pass, bf16; less is better")
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=130)
