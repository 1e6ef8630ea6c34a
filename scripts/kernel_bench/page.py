"""Write the figures of `bench_kernels.py` for readers: the block of BENCHMARKS.md, from the files of `--json`."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from common.pages import table
from kernel_bench.attention_cases import TORCH_ROPE, TRITON_ROPE
from kernel_bench.cases import FOR_USERS
from kernel_bench.length_cases import OVER_FA4
from kernel_bench.report import SECTIONS, Row, rows_for_users

Results = dict[str, Any]
"""What one run writes to `--json`: header, compile, rows, means, failed."""
KERNELS_MARKERS = ("<!-- bench_kernels.py: begin -->", "<!-- bench_kernels.py: end -->")
"""Around all figures of kernels, in BENCHMARKS.md."""
BY_BYTES = ("windows", "passes")
"""Sections whose work is moving bytes: they show the share of the copy rate, the others TFLOP/s."""


def merge(runs: Iterable[Results]) -> Results:
    """Return several runs of different sections as one, in the order of SECTIONS.

    Raises:
        ValueError: two runs measured the same section.
    """
    runs = list(runs)
    sections = [section for run in runs for section in {row["section"] for row in run["rows"]}]
    if repeated := sorted({section for section in sections if sections.count(section) > 1}):
        raise ValueError(f"--read: expected different sections in each file, got {', '.join(repeated)} twice")
    headers = zip(*(run["header"].split("\n\n") for run in runs), strict=True)
    merged: Results = {"header": "\n\n".join(part for same in headers for part in dict.fromkeys(same))}
    merged |= {key: [entry for run in runs for entry in run[key]] for key in ("compile", "rows", "means", "failed")}
    merged["rows"].sort(key=lambda row: list(SECTIONS).index(row["section"]))
    return merged


def contenders(row: Row) -> dict[str, float]:
    """Return the µs of a row's rivals and lower bounds, by the name of a column.

    FlashAttention 4 is the fastest of the calls that were timed: packed with `cu_seqlens`, also contiguous, also as a
    batch of equal lengths; with RoPE packed alone. Rivals after a rotation in torch are left out.
    """
    found: dict[str, float] = {}
    for name, microseconds in (row["rivals"] | row["floors"]).items():
        if not name.startswith(TORCH_ROPE):
            column = name.removeprefix(f"{TRITON_ROPE} + ")
            column = "FA4" if column.startswith("FA4") else column
            found[column] = min(microseconds, found.get(column, math.inf))
    return found


def section_table(rows: list[Row]) -> str:
    """Return the table of one section: a line for each case; columns of ours, then those of `contenders`."""
    own_names = sorted(dict.fromkeys(row["ours"] for row in rows), key=lambda name: name not in FOR_USERS)
    columns = list(dict.fromkeys(name for row in rows for name in contenders(row)))
    by_bytes = rows[0]["section"] in BY_BYTES
    has_heads = any(row["head_dim"] for row in rows)
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["title"], row["tokens"], row["head_dim"]), {})[row["ours"]] = row
    lines = []
    for (title, tokens, head_dim), implementations in cases.items():
        ours = implementations[own_names[0]]
        own = [f"{implementations[name]['microseconds']:.1f}" if name in implementations else "–" for name in own_names]
        others = contenders(ours)
        rate = f"{ours['roofline']:.0%}" if by_bytes else f"{ours['tflops']:.0f}"
        lines.append([title, str(tokens), *([str(head_dim)] if has_heads else []), f"**{own[0]}**", rate, *own[1:],
                      *(f"{others[name]:.1f}" if name in others else "–" for name in columns),
                      f"{ours['over_best']:.2f}×"])  # fmt: skip
    head = ["", "patches", *(["head_dim"] if has_heads else []), "qwenvit",
            "of the copy rate" if by_bytes else "TFLOP/s", *own_names[1:], *columns, "over the best rival"]  # fmt: skip
    return table(head, lines)


def summary_table(results: Results) -> str:
    """Return a line for each section: the speed over the best rival of each case."""
    lines = []
    for section, title in SECTIONS.items():
        speeds = [row["over_best"] for row in rows_for_users(results["rows"]) if row["section"] == section]
        if speeds:
            mean = f"**{statistics.geometric_mean(speeds):.2f}×**"
            lines.append([title, str(len(speeds)), mean, f"{min(speeds):.2f} to {max(speeds):.2f}×"])
    return table(["", "cases", "over the best rival, geometric mean", "each"], lines)


def notes(results: Results) -> list[str]:
    """Return what the tables do not say: speed over FlashAttention 4, rotation in torch, seconds to compile."""
    found = []
    over_fa4 = [bar["value"] for row in results["rows"] for bar in row["bars"] if bar["text"] == OVER_FA4]
    if over_fa4:
        ahead = sum(value >= 1 for value in over_fa4)
        found.append(
            f"Attention alone over long segments is {statistics.geometric_mean(over_fa4):.2f} times as fast as the "
            f"fastest call of FlashAttention 4 in geometric mean, {min(over_fa4):.2f} to {max(over_fa4):.2f} times, "
            f"and as fast or faster in {ahead} of the {len(over_fa4)} cases that have a bar over it"
        )
    longer = [
        microseconds - row["rivals"][name.replace(TORCH_ROPE, TRITON_ROPE)]
        for row in rows_for_users(results["rows"])
        for name, microseconds in row["rivals"].items()
        if name.startswith(TORCH_ROPE)
    ]
    if longer:
        found.append(
            "Rivals of attention with RoPE run after our RoPE pass; after transformers' rotation in torch they take "
            f"{min(longer):.0f} to {max(longer):.0f} µs longer"
        )
    if results["compile"]:
        models = (f"{row['kernels']} of {row['model']} in {row['seconds']:.0f} s" for row in results["compile"])
        found.append(f"Kernels of a model compile cold, one after another: {', '.join(models)}")
    return found + [f"Failed: {line}" for line in results["failed"]]


def block(results: Results) -> str:
    """Return all figures for BENCHMARKS.md."""
    parts = [results["header"], summary_table(results), "\n".join(f"- {note}." for note in notes(results))]
    for section, title in SECTIONS.items():
        if rows := [row for row in results["rows"] if row["section"] == section]:
            parts.append(f"<details><summary>{title}, µs</summary>\n\n{section_table(rows)}\n\n</details>")
    return "\n\n".join(parts)
