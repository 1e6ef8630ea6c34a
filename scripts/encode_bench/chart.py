"""Draw where the time goes from files to embeddings, for `bench_encode.py`."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from encode_bench.report import stages_ms
from encode_bench.verdicts import CPU_RIVAL, ENCODE, GPU_RIVAL, HF_RIVAL, TOWER, Result, Row

DECODE, COPY, PREPROCESSING, TOWER_PART, WAITING, PROCESSOR, THEIR_TOWER = (
    "decode", "copy", "GPU preprocessing", "qwenvit's tower", "waiting for the stages before it",
    "transformers' processor, copies, waiting", "transformers' processor, copies, its tower",
)  # fmt: skip
COLOURS = {DECODE: "#e0a030", COPY: "#7a5aa8", PREPROCESSING: "#2a9d8f", TOWER_PART: "#1f5fbf", WAITING: "#c0392b",
           PROCESSOR: "#9a9a9a", THEIR_TOWER: "#c9c9c9"}  # fmt: skip
LABELS = {ENCODE: "qwenvit's encode", GPU_RIVAL: "transformers' processor on the GPU\n+ qwenvit's tower",
          CPU_RIVAL: "transformers' processor on the CPU\n+ qwenvit's tower",
          HF_RIVAL: "transformers' processor on the GPU\n+ its tower (sdpa)"}  # fmt: skip


def parts_by_bar(row: Row, threads: int) -> dict[str, Mapping[str, float]]:
    """Return the ms an image of the parts of each bar, from its left."""
    stages, rest = stages_ms(row, threads), {}
    for name in (GPU_RIVAL, CPU_RIVAL):
        rest[name] = max(0.0, (row["times"][name] - row["stages"]["decode"] - row["times"][TOWER]) * 1e3)
    decode, tower = row["stages"]["decode"] * 1e3, stages["tower"]
    before_tower = f"its stages before the tower, which\noverlap with it (decode: {threads} threads)"
    return {
        LABELS[ENCODE]: {TOWER_PART: tower, WAITING: stages["waiting"]},
        before_tower: {DECODE: stages["decode"], COPY: stages["copy"], PREPROCESSING: stages["preprocessing"]},
        LABELS[GPU_RIVAL]: {DECODE: decode, PROCESSOR: rest[GPU_RIVAL], TOWER_PART: tower},
        LABELS[CPU_RIVAL]: {DECODE: decode, PROCESSOR: rest[CPU_RIVAL], TOWER_PART: tower},
        LABELS[HF_RIVAL]: {DECODE: decode, THEIR_TOWER: max(0.0, row["times"][HF_RIVAL] * 1e3 - decode)},
    }


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
    figure.legend(handles, list(COLOURS), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / size[1], 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
