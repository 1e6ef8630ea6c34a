"""Print the results of `bench_kernels.py` as markdown tables, and draw them as a chart."""

import itertools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernel_bench.cases import FOR_USERS, Case
from kernel_bench.length_cases import OVER_FA4
from kernel_bench.timing import LIBRARIES

SECTIONS = {
    "compile": "Compile time of all kernels that a model's tower calls, cold, one after another",
    "windows": "RoPE + attention over windows of 64 patches",
    "full": "RoPE + attention over a whole image",
    "lengths": "Attention alone, one sequence",
    "segments": "Attention alone over long segments",
    "qkv": "QKV projection + bias + RoPE",
    "mlp": "MLP, first half: projection + bias + activation",
    "passes": "Single passes: norms, activations, merges, positions",
    "patch": "Patch embedding",
}
"""Names and titles, in the order they run."""
COMPILE_LIMIT = 60
"""Seconds in which all kernels of a model should compile."""
FA4_MEAN_LIMIT = 1.08
"""Speed over FlashAttention 4 to reach in the geometric mean of all cases that have a target over it."""
Row = dict[str, Any]
"""One line of a table; its keys are those of `--json`."""


def rows_for_users(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the implementations that `qwenvit.ops` runs; the others are for comparison."""
    return [row for row in rows if row["ours"] in FOR_USERS]


def table_header(compared: list[str]) -> str:
    """Return the header of a section's table, with a column of times for each of `compared`."""
    columns = ["case", "S", "D", "implementation", "kernels launched", "µs", "TFLOP/s", "GB/s", "roofline"]
    columns += ["moved / minimum bytes", "peak MiB (torch)", *(f"{name}, µs" for name in compared)]
    columns += ["over the best rival", "targets"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(row: Row, compared: list[str]) -> str:
    """Format one row, with the times of `compared` (rivals and lower bounds); a dash where there is none."""
    targets = ", ".join(map(bar_text, row["bars"]))
    microseconds = row["rivals"] | row["floors"]
    cells = [
        row["title"],
        str(row["tokens"]),
        str(row["head_dim"] or "–"),
        row["ours"],
        " + ".join(name if name in (*LIBRARIES, "torch") else f"`{name}`" for name in row["kernels"]) or "not seen",
        f"**{row['microseconds']:.1f}**",
        f"{row['tflops']:.0f}" if row["tflops"] >= 10 else f"{row['tflops']:.1f}",
        f"{row['gigabytes']:.0f}",
        f"{row['roofline']:.0%}",
        f"{row['moved_bytes'] / 1e6:.1f} / {row['fewest_bytes'] / 1e6:.1f} MB",
        f"{row['peak_bytes'] / 2**20:.1f} ({row['torch_peak_bytes'] / 2**20:.1f})",
        *(f"{microseconds[name]:.1f}" if name in microseconds else "–" for name in compared),
        f"{row['over_best']:.2f}×",
        targets,
    ]
    return f"| {' | '.join(cells)} |"


def bar_text(bar: Row) -> str:
    """Format a figure, what it is, its limit and whether it meets that."""
    return (
        f"{bar['value']:.3f}{bar['unit']} {bar['text']} ({'≤' if bar['at_most'] else '≥'} {bar['limit']:g}) "
        f"{'✓' if bar['met'] else '✗'}"
    )


def mean_over_fa4(rows: Iterable[Row], cases: Iterable[Case]) -> list[Row]:
    """Return a bar for the geometric mean of all speeds over FlashAttention 4; none where no case has such a target.

    A case that was not timed fails the bar: the mean of the others says nothing about it.
    """
    targets = (target for case in cases for of_name in case.targets.values() for target in of_name)
    count = sum(target.text == OVER_FA4 for target in targets)
    values = [bar["value"] for row in rows for bar in row["bars"] if bar["text"] == OVER_FA4]
    mean = statistics.geometric_mean(values) if values else math.nan
    text = f"{OVER_FA4} in geometric mean of {len(values)} of {count} cases"
    met = len(values) == count and mean >= FA4_MEAN_LIMIT
    bar = {"text": text, "unit": "×", "limit": FA4_MEAN_LIMIT, "at_most": False, "value": mean, "met": met}
    return [bar] if count else []


def compile_table(times: list[Row]) -> str:
    """Return a table of models, numbers of kernels and seconds, each against COMPILE_LIMIT."""
    lines = [
        f"| {row['model']} | {row['kernels']} | {row['seconds']:.1f} | "
        f"{'✓' if row['seconds'] <= COMPILE_LIMIT else '✗'} |"
        for row in times
    ]
    columns = f"| model | kernels | s | ≤ {COMPILE_LIMIT} s |"
    return "\n".join([f"\n### {SECTIONS['compile']}\n", columns, "|---|---|---|---|", *lines])


def draw_chart(rows: list[Row], device: str, path: Path) -> None:
    """Draw a panel for each section: speed over the best rival by number of patches. At 1.0 both are equally fast."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_for_users(rows)
    sections = [name for name in SECTIONS if any(row["section"] == name for row in rows)]
    if not sections:
        raise SystemExit("--chart: nothing was measured")
    height = -(-len(sections) // 2)
    figure, axes = plt.subplots(height, 2, figsize=(15, 0.7 + 2.3 * height), squeeze=False)
    for axis in axes.flat[len(sections) :]:
        axis.set_axis_off()
    for axis, section in zip(axes.flat, sections, strict=False):
        section_rows = [row for row in rows if row["section"] == section]
        series = list(dict.fromkeys(row["series"] for row in section_rows))
        sizes = sorted({row["tokens"] for row in section_rows})
        colours = itertools.cycle(plt.get_cmap("tab20").colors)
        series_at = {
            size: [label for label in series if any(_is_at(row, label, size) for row in section_rows)] for size in sizes
        }
        in_legend: set[str] = set()
        for colour, label in zip(colours, series, strict=False):
            for i_size, size in enumerate(sizes):
                row = next((row for row in section_rows if _is_at(row, label, size)), None)
                if row is None:
                    continue
                width = 0.8 / len(series_at[size])
                x = i_size - 0.4 + width * (series_at[size].index(label) + 0.5)
                legend = None if label in in_legend else label
                axis.bar(x, row["over_best"], width * 0.94, color=colour, label=legend)
                in_legend.add(label)
        axis.axhline(1.0, color="0.25", linewidth=1)
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes], fontsize=8)
        axis.set_xlabel("patches")
        axis.set_ylabel("speed over best rival")
        axis.set_title(SECTIONS[section], loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"qwenvit's kernels over the best rival of each row, bf16, {device} (1.0: as fast as the rival)")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=100)


def _is_at(row: Row, series: str, size: int) -> bool:
    return row["series"] == series and row["tokens"] == size
