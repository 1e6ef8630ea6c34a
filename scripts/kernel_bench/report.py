"""Rows of `bench_kernels.py` as markdown and as a chart."""

import itertools
from pathlib import Path
from typing import Any

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
"""In the order they run, with their titles."""
Row = dict[str, Any]


def table_head(others: list[str]) -> str:
    """The head of a section's table, with a column for each rival and floor."""
    columns = ["case", "S", "D", "what", "kernel that ran", "µs", "TFLOP/s", "GB/s", "roofline", "moved / fewest bytes"]
    columns += ["peak MiB (torch)", *(f"{name}, µs" for name in others), "over the best", "bars"]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(row: Row, others: list[str]) -> str:
    bars = ", ".join(
        f"{bar['value']:.3f}{bar['unit']} {bar['text']} ({'≤' if bar['at_most'] else '≥'} {bar['limit']:g}) "
        f"{'✓' if bar['met'] else '✗'}"
        for bar in row["bars"]
    )
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
        *(f"{microseconds[name]:.1f}" if name in microseconds else "–" for name in others),
        f"{row['over_best']:.2f}×",
        bars,
    ]
    return f"| {' | '.join(cells)} |"


def compile_table(found: list[Row]) -> str:
    """Models, kernels and seconds, by the bar of 60 s."""
    rows = [
        f"| {row['model']} | {row['kernels']} | {row['seconds']:.1f} | {'✓' if row['seconds'] <= 60 else '✗'} |"
        for row in found
    ]
    return "\n".join([f"\n### {SECTIONS['compile']}\n", "| model | kernels | s | ≤ 60 s |", "|---|---|---|---|", *rows])


def draw(rows: list[Row], device: str, path: Path) -> None:
    """A panel a section: speed over the best rival, by number of patches; 1.0 is the rival."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sections = [name for name in SECTIONS if any(row["section"] == name for row in rows)]
    if not sections:
        raise SystemExit("--chart: nothing was measured")
    figure, axes = plt.subplots(len(sections), 1, figsize=(11, 2.9 * len(sections)), squeeze=False)
    for axis, section in zip(axes[:, 0], sections, strict=True):
        own = [row for row in rows if row["section"] == section]
        series = list(dict.fromkeys(_series(row) for row in own))
        sizes = sorted({row["tokens"] for row in own})
        colours = itertools.cycle(plt.get_cmap("tab20").colors)
        shown = {size: [name for name in series if any(_at(row, name, size) for row in own)] for size in sizes}
        labels: set[str] = set()
        for colour, name in zip(colours, series, strict=False):
            for place, size in enumerate(sizes):
                row = next((row for row in own if _at(row, name, size)), None)
                if row is None:
                    continue
                width = 0.8 / len(shown[size])
                left = place - 0.4 + width * (shown[size].index(name) + 0.5)
                axis.bar(left, row["over_best"], width * 0.94, color=colour, label=None if name in labels else name)
                labels.add(name)
        axis.axhline(1.0, color="0.25", linewidth=1)
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axis.set_xlabel("patches")
        axis.set_ylabel("speed over best rival")
        axis.set_title(SECTIONS[section], loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"qwenvit's kernels over the best rival of each row, bf16, {device} (1.0: as fast as the rival)")
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=130)


def _series(row: Row) -> str:
    return row["series"] if row["ours"] == "qwenvit" else f"{row['series']}, {row['ours']}"


def _at(row: Row, name: str, size: int) -> bool:
    return _series(row) == name and row["tokens"] == size
