"""Draw where the time goes from files to embeddings, for `bench_encode.py`."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from encode_bench.report import stages_ms
from encode_bench.verdicts import CPU_RIVAL, ENCODE, GPU_RIVAL, HF_RIVAL, Result, Row

DECODE, COPY, PREPROCESSING, TOWER_PART, WAITING, WHOLE = (
    "decode", "copy", "GPU preprocessing", "qwenvit's tower", "waiting for the stages before it",
    "everything, with transformers' processor",
)  # fmt: skip
COLOURS = {DECODE: "#e0a030", COPY: "#7a5aa8", PREPROCESSING: "#2a9d8f", TOWER_PART: "#1f5fbf", WAITING: "#c0392b",
           WHOLE: "#b0b0b0"}  # fmt: skip
LABELS = {ENCODE: "qwenvit's encode", GPU_RIVAL: "transformers' processor on the GPU\n+ qwenvit's tower",
          CPU_RIVAL: "transformers' processor on the CPU\n+ qwenvit's tower",
          HF_RIVAL: "transformers' processor on the GPU\n+ its tower (sdpa)"}  # fmt: skip


def parts_by_bar(row: Row, threads: int) -> dict[str, Mapping[str, float]]:
    """Return the ms an image of the parts of each bar, from its left.

    Rivals have one part: their decoder works while the GPU still runs the tower, so that parts would overlap.
    """
    stages = stages_ms(row, threads)
    before_tower = f"its stages before the tower, which\noverlap with it (decode: {threads} threads)"
    return {
        LABELS[ENCODE]: {TOWER_PART: stages["tower"], WAITING: stages["waiting"]},
        before_tower: {DECODE: stages["decode"], COPY: stages["copy"], PREPROCESSING: stages["preprocessing"]},
    } | {LABELS[name]: {WHOLE: row["times"][name] * 1e3} for name in (GPU_RIVAL, CPU_RIVAL, HF_RIVAL)}


def draw(results: list[Result], path: Path) -> None:
    """Draw a row for each model, a panel for each folder and a stacked bar for each contender.

    Each panel has its own scale.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [result for result in results if result["rows"]]
    columns = max((len(result["rows"]) for result in chosen), default=1)
    size = 3.2 + 2.3 * columns, 1.5 + 1.9 * max(len(chosen), 1)
    figure, axes = plt.subplots(max(len(chosen), 1), columns, figsize=size, squeeze=False)
    for model_axes, result in zip(axes, chosen, strict=False):
        for axis, row in itertools.zip_longest(model_axes, result["rows"]):
            if row is None:
                axis.set_visible(False)
                continue
            bars = parts_by_bar(row, result["threads"])
            for y, parts in enumerate(bars.values()):
                left = 0.0
                for part, ms in parts.items():
                    axis.barh(y, ms, 0.74, left=left, color=COLOURS[part])
                    left += ms
                axis.annotate(f"{left:.1f}", (left, y), (3, 0), textcoords="offset points", va="center", fontsize=8,
                              fontweight="bold" if y == 0 else "normal")  # fmt: skip
            axis.set_ylim(len(bars) - 0.5, -0.5)
            axis.set_xlim(0, 1.25 * max(sum(parts.values()) for parts in bars.values()))
            axis.set_yticks(range(len(bars)), list(bars) if axis is model_axes[0] else [""] * len(bars), fontsize=8)
            axis.tick_params(left=False, bottom=False, labelbottom=False)
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            axis.set_title(f"{row['images']} images, {row['name']}", fontsize=9)
        model_axes[0].set_ylabel(result["model"], fontsize=10, fontweight="bold", labelpad=12)
    machines = ", ".join(dict.fromkeys(result["machine"].partition(",")[0] for result in chosen))
    figure.suptitle(f"From JPEG files to embeddings, ms an image (less is better); {machines}, bf16", fontsize=11)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / size[1], 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
